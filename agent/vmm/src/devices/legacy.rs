//! What remains of the PC's oldest ports: the CMOS clock and the keyboard controller's reset line.

use std::time::{SystemTime, UNIX_EPOCH};

/// Keyboard controller command: pulse output line 0, which resets the processor.
pub const KEYBOARD_RESET: u8 = 0xfe;

/// The MC146818 clock behind ports 0x70 and 0x71, read-only, in UTC, binary-coded decimal.
#[derive(Debug, Default)]
pub struct Clock {
    index: u8,
}

impl Clock {
    /// Selects a register (port 0x70). Bit 7 masks NMIs on a PC and is no part of the index.
    pub fn select(&mut self, index: u8) {
        self.index = index & 0x7f;
    }

    /// The selected register.
    pub const fn selected(&self) -> u8 {
        self.index
    }

    /// Reads the selected register (port 0x71).
    pub fn read(&self) -> u8 {
        let seconds = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |d| d.as_secs());
        register(self.index, seconds)
    }
}

/// Register `index` at `seconds` since the Unix epoch.
fn register(index: u8, seconds: u64) -> u8 {
    /// Register A: divider at 32 kHz, no update in progress.
    const STATUS_A: u8 = 0x26;
    /// Register B: 24 hours, BCD, no interrupts.
    const STATUS_B: u8 = 0x02;
    /// Register D: valid RAM and time.
    const STATUS_D: u8 = 0x80;
    let (days, of_day) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil_from_days(days);
    match index {
        0x00 => bcd(of_day % 60),
        0x02 => bcd(of_day / 60 % 60),
        0x04 => bcd(of_day / 3600),
        // 1 is Sunday; day 0 of the epoch was a Thursday.
        0x06 => bcd((days + 4) % 7 + 1),
        0x07 => bcd(day),
        0x08 => bcd(month),
        0x09 => bcd(year % 100),
        0x32 => bcd(year / 100),
        0x0a => STATUS_A,
        0x0b => STATUS_B,
        0x0d => STATUS_D,
        _ => 0,
    }
}

fn bcd(value: u64) -> u8 {
    u8::try_from(((value / 10 % 10) << 4) | (value % 10)).unwrap_or(0)
}

/// The Gregorian date of a day since 1970-01-01: (year, month, day).
fn civil_from_days(days: u64) -> (u64, u64, u64) {
    let leap = |year: u64| {
        year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
    };
    // Start at the 400-year cycle, so that the loop is short for every input.
    let (mut year, mut rest) = (1970 + days / 146_097 * 400, days % 146_097);
    loop {
        let length = if leap(year) { 366 } else { 365 };
        if rest < length {
            break;
        }
        rest -= length;
        year += 1;
    }
    let february = if leap(year) { 29 } else { 28 };
    let mut month = 1;
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if rest < length {
            break;
        }
        rest -= length;
        month += 1;
    }
    (year, month, rest + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clock_shows_utc_in_bcd() {
        // 2026-11-24T00:19:57Z, a Tuesday.
        let at = |index| register(index, 1_795_479_597);
        let date = [at(0x32), at(9), at(8), at(7), at(6), at(4), at(2), at(0)];
        assert_eq!(date, [0x20, 0x26, 0x11, 0x24, 3, 0x00, 0x19, 0x57]);
    }

    #[test]
    fn leap_days_exist() {
        assert_eq!(civil_from_days(11_016), (2000, 2, 29));
        assert_eq!(civil_from_days(0), (1970, 1, 1));
        assert_eq!(civil_from_days(19_782), (2024, 2, 29));
    }
}
