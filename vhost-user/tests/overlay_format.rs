//! The format of layered images: what is written is read, and nothing else is believed.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::path::PathBuf;

use keelson_blk::overlay::header::{BLOCK_BYTES, Base, Header, HeaderError, KeyCheck, VERSION};
use keelson_blk::overlay::map::{StripeMap, decode_block, encode_block};
use proptest::prelude::*;
use uuid::Uuid;

fn base() -> impl Strategy<Value = Base> {
    let path = "[a-z/.é]{1,200}".prop_map(PathBuf::from);
    prop_oneof![
        Just(Base::None),
        (
            path.clone(),
            0..1_u64 << 40,
            any::<[u8; 32]>(),
            any::<(i64, u32)>()
        )
            .prop_map(|(path, bytes, digest, modified)| Base::Raw {
                path,
                bytes,
                digest,
                modified
            }),
        (path, 0..1_u64 << 40, any::<u128>(), any::<u64>()).prop_map(
            |(path, bytes, uuid, opened)| Base::Striped {
                path,
                bytes,
                uuid: Uuid::from_u128(uuid),
                opened
            }
        ),
        (
            "http://[a-z/]{1,99}",
            0..1_u64 << 40,
            any::<[u8; 32]>(),
            any::<bool>()
        )
            .prop_map(|(url, bytes, digest, checksums)| Base::Http {
                url,
                bytes,
                manifest: Some(digest).filter(|digest| checksums && *digest != [0; 32]),
                validator: Some(digest).filter(|digest| !checksums && *digest != [0; 32]),
            }),
    ]
}

prop_compose! {
    fn header()(
        uuid in any::<u128>(),
        generation in 1..u64::MAX,
        opened in 0..u64::MAX,
        more in 0..1_u64 << 30,
        stripe in 16..=20_u32,
        room in 0..1000_u64,
        sealed in any::<bool>(),
        key in proptest::option::of(any::<([u8; 16], [u8; 32])>()),
        base in base(),
    ) -> Header {
        let mut header = Header {
            uuid: Uuid::from_u128(uuid),
            generation,
            opened,
            bytes: (base.bytes() + more).next_multiple_of(512).max(512),
            stripe_bytes: 1 << stripe,
            map_capacity: 0,
            sealed,
            key_check: key.map(|(salt, mac)| KeyCheck { salt, mac }),
            base,
        };
        header.map_capacity = header.map_blocks() + room;
        header
    }
}

fn sealed_with_checksum(mut copy: [u8; BLOCK_BYTES]) -> [u8; BLOCK_BYTES] {
    let checksum = crc32fast::hash(&copy[..BLOCK_BYTES - 4]);
    copy[BLOCK_BYTES - 4..].copy_from_slice(&checksum.to_le_bytes());
    copy
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_header_is_read_as_it_was_written(header in header()) {
        prop_assert_eq!(Header::parse(&header.to_bytes()), Ok(header));
    }

    #[test]
    fn a_flipped_bit_is_noticed(header in header(), bit in 0..BLOCK_BYTES * 8) {
        let mut copy = header.to_bytes();
        copy[bit / 8] ^= 1 << (bit % 8);
        prop_assert!(Header::parse(&copy).is_err());
    }

    #[test]
    fn a_forged_header_is_possible_or_refused(
        header in header(),
        changes in proptest::collection::vec((0..300_usize, any::<u8>()), 0..20),
    ) {
        let mut copy = header.to_bytes();
        for (place, byte) in changes {
            copy[place] = byte;
        }
        if let Ok(parsed) = Header::parse(&sealed_with_checksum(copy)) {
            prop_assert_eq!(parsed.check(), Ok(()));
            prop_assert!(parsed.data_offset() < 1 << 40);
            prop_assert!(parsed.bytes <= parsed.largest_size());
            prop_assert_eq!(Header::parse(&parsed.to_bytes()), Ok(parsed));
        }
    }

    #[test]
    fn a_block_of_the_map_belongs_to_its_place(
        stripes in proptest::collection::btree_set(0..32512_u64, 0..50),
        generation in any::<u64>(),
        bit in 0..BLOCK_BYTES * 8,
    ) {
        let map = StripeMap::new(3);
        for stripe in &stripes {
            prop_assert_eq!(map.insert(32512 + stripe), Some(1));
            prop_assert_eq!(map.insert(32512 + stripe), None);
        }
        let uuid = Uuid::from_u128(5);
        let copy = encode_block(uuid, 1, generation, &map.block(1));
        let (read_generation, bits) = decode_block(uuid, 1, &copy).unwrap();
        prop_assert_eq!(read_generation, generation);
        let again = StripeMap::new(3);
        again.load_block(1, &bits);
        for stripe in 0..3 * 32512 {
            let expected = stripe >= 32512 && stripes.contains(&(stripe - 32512));
            prop_assert_eq!(again.contains(stripe), expected);
        }
        prop_assert_eq!(again.count(), stripes.len() as u64);
        prop_assert_eq!(decode_block(uuid, 0, &copy), None);
        prop_assert_eq!(decode_block(Uuid::from_u128(6), 1, &copy), None);
        let mut flipped = copy;
        flipped[bit / 8] ^= 1 << (bit % 8);
        prop_assert_eq!(decode_block(uuid, 1, &flipped), None);
    }

    #[test]
    fn no_bytes_make_the_parsers_panic(bytes in proptest::collection::vec(any::<u8>(), BLOCK_BYTES)) {
        let _ = decode_block(Uuid::nil(), 0, &bytes);
        let mut copy: [u8; BLOCK_BYTES] = bytes.try_into().unwrap();
        let _ = Header::parse(&copy);
        copy[..8].copy_from_slice(b"KEELSTRP");
        copy[8..12].copy_from_slice(&VERSION.to_le_bytes());
        let _ = Header::parse(&sealed_with_checksum(copy));
    }
}

#[test]
fn a_later_version_and_unknown_features_have_errors_of_their_own() {
    let header = Header {
        uuid: Uuid::nil(),
        generation: 1,
        opened: 0,
        bytes: 512,
        stripe_bytes: 65536,
        map_capacity: 1,
        sealed: false,
        key_check: None,
        base: Base::None,
    };
    let mut later = header.to_bytes();
    later[8] = 2;
    // Whatever else a later version has in there.
    later[100..4000].fill(0xee);
    let parsed = Header::parse(&sealed_with_checksum(later));
    assert_eq!(parsed, Err(HeaderError::NewerVersion(2)));
    let mut featured = header.to_bytes();
    featured[64] = 4;
    let parsed = Header::parse(&sealed_with_checksum(featured));
    assert_eq!(parsed, Err(HeaderError::UnknownFeatures(4)));
}
