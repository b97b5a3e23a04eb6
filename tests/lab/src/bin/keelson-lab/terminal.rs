use std::io::stdin;

use anyhow::{Context, Result};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

/// Standard input's terminal in raw mode, put back when dropped.
pub struct RawTerminal {
    before: Termios,
    /// Rows and columns.
    pub size: (u16, u16),
}

impl RawTerminal {
    pub fn enter() -> Result<Self> {
        let before = tcgetattr(stdin()).context("--tty needs a terminal on standard input")?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(stdin(), OptionalActions::Now, &raw).context("setting the terminal up")?;
        let size = tcgetwinsize(stdin()).map_or((24, 80), |size| (size.ws_row, size.ws_col));
        Ok(Self { before, size })
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        let _nothing_left_to_do = tcsetattr(stdin(), OptionalActions::Now, &self.before);
    }
}
