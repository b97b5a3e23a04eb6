use proptest::prelude::*;

use super::*;

fn encoded(frames: &[Frame]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut sender = Sender::start(&mut bytes).unwrap();
    for frame in frames {
        sender.send(frame).unwrap();
    }
    bytes
}

fn decoded(bytes: &[u8]) -> Result<Vec<Frame>, StreamError> {
    let mut rest = bytes;
    let mut receiver = Receiver::start(&mut rest)?;
    let mut frames = Vec::new();
    while !receiver.reader.is_empty() {
        frames.push(receiver.receive()?);
    }
    Ok(frames)
}

fn any_frame() -> impl Strategy<Value = Frame> {
    let bytes = prop::collection::vec(any::<u8>(), 0..300);
    prop_oneof![
        bytes.clone().prop_map(Frame::Hello),
        Just(Frame::Ready),
        (any::<u64>(), any::<u8>(), 1..4usize, any::<bool>()).prop_map(
            |(first, seed, pages, noise)| {
                let byte = |at: usize| {
                    if noise {
                        u8::try_from(at * at / 7 % 251).unwrap() ^ seed
                    } else {
                        seed
                    }
                };
                let bytes = (0..pages * 4096).map(byte).collect();
                Frame::Pages { first, bytes }
            }
        ),
        (any::<u64>(), any::<u64>())
            .prop_map(|(first, count)| Frame::Zeros(PageRange { first, count })),
        bytes.prop_map(Frame::State),
        Just(Frame::Loaded),
        ".{0,100}".prop_map(Frame::Failed),
    ]
}

proptest! {
    #[test]
    fn frames_come_as_they_were_sent(frames in prop::collection::vec(any_frame(), 0..6)) {
        prop_assert_eq!(decoded(&encoded(&frames)).unwrap(), frames);
    }

    #[test]
    fn a_flipped_bit_is_noticed(frames in prop::collection::vec(any_frame(), 1..4), at in any::<prop::sample::Index>()) {
        let mut bytes = encoded(&frames);
        let bit = at.index(bytes.len() * 8);
        bytes[bit / 8] ^= 1 << (bit % 8);
        prop_assert!(decoded(&bytes).is_err());
    }

    #[test]
    fn a_stream_that_is_cut_within_a_frame_says_so(frames in prop::collection::vec(any_frame(), 1..4), at in any::<prop::sample::Index>()) {
        let bytes = encoded(&frames);
        let whole: Vec<usize> = (0..=frames.len()).map(|count| encoded(&frames[..count]).len()).collect();
        let length = at.index(bytes.len());
        match decoded(&bytes[..length]) {
            Ok(_) => prop_assert!(whole.contains(&length)),
            Err(StreamError::Cut) => prop_assert!(!whole.contains(&length)),
            Err(other) => prop_assert!(false, "{}", other),
        }
    }

    #[test]
    fn a_frame_that_is_missing_or_comes_twice_is_noticed(frames in prop::collection::vec(any_frame(), 2..5), at in any::<prop::sample::Index>(), twice in any::<bool>()) {
        let end = |count: usize| encoded(&frames[..count]).len();
        let which = at.index(frames.len() - 1);
        let mut bytes = encoded(&frames);
        let frame = bytes[end(which)..end(which + 1)].to_vec();
        if twice {
            bytes.splice(end(which)..end(which), frame);
        } else {
            bytes.drain(end(which)..end(which + 1));
        }
        prop_assert!(decoded(&bytes).is_err());
    }

    #[test]
    fn any_bytes_are_refused_or_frames(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        crate::fuzzing::migration(&bytes);
    }
}

#[test]
fn other_streams_versions_and_architectures_are_told_apart() {
    let refused = |bytes: &[u8]| decoded(bytes).unwrap_err().to_string();
    assert!(refused(b"GET / HTTP/1.1\r\n").contains("signature"));
    let mut newer = encoded(&[]);
    newer[8] = 2;
    assert!(refused(&newer).contains("speaks version 2"));
    let mut foreign = encoded(&[]);
    foreign[12] = 183;
    assert!(refused(&foreign).contains("ELF machine 183"));
    assert!(matches!(decoded(b"KEEL").unwrap_err(), StreamError::Cut));
}

#[test]
fn zeros_and_repetition_take_little_and_noise_not_more_than_itself() {
    let noise: Vec<u8> = (0..16 * 4096u32)
        .map(|at| at.wrapping_mul(2_654_435_761).to_be_bytes()[0])
        .collect();
    let length = |bytes: Vec<u8>| encoded(&[Frame::Pages { first: 0, bytes }]).len();
    assert!(length(vec![7; 64 << 10]) < 1024);
    assert!(length(noise) <= (64 << 10) + PREAMBLE_BYTES + HEADER_BYTES);
}
