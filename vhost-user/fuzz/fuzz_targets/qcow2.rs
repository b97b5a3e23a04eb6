//! A qcow2 image from anywhere: read to the end, or refused.
#![no_main]

use keelson_blk::qcow2::Qcow2Image;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let mut bytes = input.to_vec();
    if let Some(magic) = bytes.get_mut(..4) {
        magic.copy_from_slice(b"QFI\xfb");
    }
    let Ok(mut image) = Qcow2Image::open(&bytes[..]) else {
        return;
    };
    let clusters = image.header().clusters();
    let mut buffer = vec![0; image.header().cluster_bytes() as usize];
    for index in (0..clusters.min(64)).chain(clusters.saturating_sub(8)..clusters) {
        if image.read_cluster(index, &mut buffer).is_err() {
            return;
        }
    }
});
