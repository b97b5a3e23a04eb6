//! Manifests of images on servers: what is written is read back, and nothing else is taken.

#![allow(clippy::unwrap_used, reason = "in tests")]

use keelson_blk::remote::Manifest;
use proptest::prelude::*;

const CHUNK: u64 = 64 << 10;

fn manifest(content: &[u8]) -> Manifest {
    Manifest::of(&mut &content[..], CHUNK, |_| {}).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn what_is_written_is_read_back_and_recognizes_its_chunks_alone(
        len in 1_usize..200_000,
        seed in any::<u8>(),
        flipped in any::<prop::sample::Index>(),
    ) {
        let bytes = (0..251_u8).cycle().map(|byte| byte ^ seed);
        let mut content: Vec<u8> = bytes.take(len).collect();
        let manifest = manifest(&content);
        let text = manifest.to_text();
        let again = Manifest::parse(text.as_bytes());
        prop_assert_eq!(again.as_ref(), Ok(&manifest));
        let matches = |content: &[u8]| {
            let chunks = content.chunks(usize::try_from(CHUNK).unwrap());
            let mut matches = (0..).zip(chunks);
            matches.all(|(chunk, bytes)| manifest.matches(chunk, bytes))
        };
        prop_assert!(matches(&content));
        content[flipped.index(len)] ^= 0x10;
        prop_assert!(!matches(&content));
    }

    #[test]
    fn a_text_that_was_changed_is_refused_or_is_another_manifest(
        chunks in 1_u64..4,
        place in any::<prop::sample::Index>(),
        byte in any::<u8>(),
        cut in any::<prop::sample::Index>(),
    ) {
        let content = vec![7; usize::try_from(chunks * CHUNK).unwrap()];
        let manifest = manifest(&content);
        let mut text = manifest.to_text().into_bytes();
        let _ = Manifest::parse(&text[..cut.index(text.len())]);
        let place = place.index(text.len());
        if text[place] != byte {
            text[place] = byte;
            // The end of the last line alone carries nothing.
            prop_assert!(place + 1 == text.len() || Manifest::parse(&text) != Ok(manifest));
        }
    }

    #[test]
    fn no_bytes_make_the_parser_panic(bytes in prop::collection::vec(any::<u8>(), 0..500)) {
        let _ = Manifest::parse(&bytes);
        let mut text = b"keelson-image-manifest 1\nbytes ".to_vec();
        text.extend_from_slice(&bytes);
        let _ = Manifest::parse(&text);
    }
}
