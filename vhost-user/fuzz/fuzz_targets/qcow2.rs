//! A qcow2 image from anywhere: read to the end, or refused.
#![no_main]

use keelson_blk::qcow2::Qcow2Image;
use libfuzzer_sys::fuzz_target;

/// A header whose fields fit together, and tables with entries that point into the file: two bytes of
/// the input make one.
fn make_plausible(kind: u8, input: &[u8]) -> Vec<u8> {
    let cluster = 512_usize << (kind >> 2 & 1);
    let number = |place: usize| usize::from(input.get(place).copied().unwrap_or(0));
    let mut bytes = vec![0; cluster];
    let mut put = |place: usize, field: &[u8]| {
        bytes[place..place + field.len()].copy_from_slice(field);
    };
    put(4, &(2 + u32::from(kind >> 3 & 1)).to_be_bytes());
    put(20, &cluster.ilog2().to_be_bytes());
    put(24, &(1 + (number(0) << 9 | number(1)) as u64).to_be_bytes());
    put(36, &(number(2) as u32 % 17).to_be_bytes());
    put(40, &(cluster as u64 * (1 + number(3) as u64 % 4)).to_be_bytes());
    put(96, &4_u32.to_be_bytes());
    put(100, &(104 + 8 * (number(4) as u32 & 1)).to_be_bytes());
    // Compression, and its type.
    put(79, &[input.get(5).copied().unwrap_or(0) & 8]);
    put(104, &[input.get(6).copied().unwrap_or(0) & 1]);
    let rest = input.get(7..).unwrap_or_default();
    let (tables, data) = rest.split_at(rest.len().min(512));
    for [flags, place] in tables.as_chunks::<2>().0 {
        let flags = u64::from(flags & 0xc0) << 56 | u64::from(flags & 1);
        let entry = flags | u64::from(*place) * cluster as u64 / 2;
        bytes.extend_from_slice(&entry.to_be_bytes());
    }
    bytes.resize(bytes.len().next_multiple_of(cluster), 0);
    bytes.extend_from_slice(data);
    bytes
}

fuzz_target!(|input: &[u8]| {
    let Some((kind, input)) = input.split_first() else {
        return;
    };
    let mut bytes = match kind & 3 {
        0 => input.to_vec(),
        _ => make_plausible(*kind, input),
    };
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
