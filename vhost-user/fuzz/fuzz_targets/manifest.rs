//! A manifest from any server: taken as it is written, or refused.
#![no_main]

use keelson_blk::remote::Manifest;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let mut text = b"keelson-image-manifest 1\n".to_vec();
    text.extend_from_slice(input);
    let Ok(manifest) = Manifest::parse(&text) else {
        return;
    };
    let again = Manifest::parse(manifest.to_text().as_bytes());
    assert_eq!(again.as_ref(), Ok(&manifest));
    let last = (manifest.bytes() - 1) / manifest.chunk_bytes();
    for chunk in [0, last, last + 1, u64::MAX] {
        let _ = manifest.matches(chunk, input);
    }
});
