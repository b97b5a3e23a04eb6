//! What guests ask about their configuration, by DHCP and router solicitations: the programs hand it to
//! the host, which answers. None of it reaches the bridge.

/// Bytes of a question that the host gets at most; a longer one is dropped.
pub const QUESTION_LIMIT: usize = 2040;

/// Bytes of the ring buffer of questions.
pub const QUESTIONS_BYTES: u32 = 1 << 20;

/// Time between two questions of one interface, on average, in nanoseconds.
pub const QUESTION_INTERVAL_NS: u64 = 100_000_000;

/// How far ahead of that an interface may be: for 20 questions at once.
pub const QUESTION_BURST_NS: u64 = 20 * QUESTION_INTERVAL_NS;

/// `SO_MARK` of the socket that answers are sent from: nothing that guests or other hosts send has it.
pub const ANSWER_MARK: u32 = 0x6b65_656c;

/// A guest's frame that asks for its configuration.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Question {
    /// The interface that it came from.
    pub ifindex: u32,
    /// Bytes of the frame.
    pub length: u32,
    /// The frame; what stands behind its length means nothing.
    pub data: [u8; QUESTION_LIMIT],
}
