//! The narrated table.

use std::io::{IsTerminal, Write};
use std::time::Instant;

use anyhow::Result;

/// Prints a row for each step as it ends and counts those that failed.
#[derive(Debug, Default)]
pub struct Report {
    passed: u32,
    failed: u32,
}

impl Report {
    /// Does a step and prints what was seen. A step that fails does not end the run.
    pub fn step<T>(&mut self, what: &str, work: impl FnOnce() -> Result<(T, String)>) -> Option<T> {
        let mut stdout = std::io::stdout();
        if stdout.is_terminal() {
            print!("  …   {what}\r");
            // A terminal that is gone shows no progress; the rows say so by themselves.
            let _ = stdout.flush();
        }
        let started = Instant::now();
        let result = work();
        let milliseconds = started.elapsed().as_millis();
        match result {
            Ok((value, seen)) => {
                self.passed += 1;
                println!("  ok  {what:<48} {milliseconds:>6} ms   {seen}");
                Some(value)
            }
            Err(error) => {
                self.failed += 1;
                println!("  NO  {what:<48} {milliseconds:>6} ms   {error:#}");
                None
            }
        }
    }

    /// Whether every step was as it should be.
    pub fn all_true(&self) -> bool {
        println!("{} passed, {} failed", self.passed, self.failed);
        self.failed == 0 && self.passed > 0
    }
}
