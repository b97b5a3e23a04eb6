//! A device without a medium, to measure everything else: reads leave the buffers as they are,
//! writes go nowhere.

use std::collections::VecDeque;
use std::io;

use super::{
    BlockDevice, ChannelContext, IoChannel, IoCompletion, IoRequest, Properties, RingOperations,
    Token,
};
use crate::image::BlockSizes;

/// A device of a size, and nothing else.
#[derive(Clone, Copy, Debug)]
pub struct NullDevice {
    bytes: u64,
}

impl NullDevice {
    /// A device that claims to have this many bytes.
    pub fn new(bytes: u64) -> Self {
        Self { bytes }
    }
}

impl BlockDevice for NullDevice {
    fn properties(&self) -> Properties {
        Properties {
            bytes: self.bytes,
            block_sizes: BlockSizes {
                logical: 512,
                physical: 4096,
                optimal: 0,
            },
            read_only: false,
            alignment: 1,
            discard: true,
        }
    }

    fn open_channel(&self, _context: &mut ChannelContext<'_>) -> io::Result<Box<dyn IoChannel>> {
        Ok(Box::new(NullChannel::default()))
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}

#[derive(Debug, Default)]
struct NullChannel(VecDeque<IoCompletion>);

impl IoChannel for NullChannel {
    fn submit(&mut self, request: IoRequest, _ring: &mut RingOperations) {
        self.0.push_back(IoCompletion {
            tag: request.tag,
            result: Ok(()),
            buffers: request.buffers,
        });
    }

    fn complete(&mut self, _token: Token, _result: i32, _ring: &mut RingOperations) -> bool {
        false
    }

    fn take_completion(&mut self) -> Option<IoCompletion> {
        self.0.pop_front()
    }
}
