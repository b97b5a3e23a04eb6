//! Lines on COM1.

use crate::supervisor;
use core::fmt;

/// Longer lines are cut.
const LINE_LIMIT: usize = 512;

/// Writes one line to the console, `payload: ` first.
macro_rules! say {
    ($($argument:tt)*) => {
        $crate::console::write_line(::core::format_args!($($argument)*))
    };
}
pub(crate) use say;

/// Writes one line to the console, `payload: ` first, in one call of the stub.
pub fn write_line(text: fmt::Arguments<'_>) {
    let mut line = Line {
        bytes: [0; LINE_LIMIT],
        length: 0,
    };
    line.push(b"payload: ");
    // A line that is too long is cut, which is no error.
    let _ = fmt::write(&mut line, text);
    line.length = line.length.min(LINE_LIMIT - 1);
    line.push(b"\n");
    supervisor::console_write(&line.bytes[..line.length]);
}

struct Line {
    bytes: [u8; LINE_LIMIT],
    length: usize,
}

impl Line {
    fn push(&mut self, bytes: &[u8]) {
        let count = bytes.len().min(LINE_LIMIT - self.length);
        self.bytes[self.length..self.length + count].copy_from_slice(&bytes[..count]);
        self.length += count;
    }
}

impl fmt::Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.push(text.as_bytes());
        Ok(())
    }
}
