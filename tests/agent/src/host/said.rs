//! What the programs say.

use std::process::Output;

/// What a command of the client said.
#[derive(Debug)]
pub struct Said {
    /// The exit code.
    pub code: Option<i32>,
    /// Standard output.
    pub output: String,
    /// Standard error.
    pub errors: String,
}

impl Said {
    /// What a program printed that has ended.
    pub(super) fn of(output: &Output) -> Self {
        Self {
            code: output.status.code(),
            output: String::from_utf8_lossy(&output.stdout).into_owned(),
            errors: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// The output of a command that was done.
    ///
    /// # Panics
    /// If it failed.
    #[track_caller]
    pub fn done(self) -> String {
        assert_eq!(self.code, Some(0), "{}{}", self.output, self.errors);
        self.output
    }

    /// Checks that the command was refused with this exit code and that it says all of `words`.
    ///
    /// # Panics
    /// If not.
    #[track_caller]
    pub fn refused(&self, code: i32, words: &[&str]) {
        assert_eq!(self.code, Some(code), "{}{}", self.output, self.errors);
        for word in words {
            assert!(
                self.errors.contains(word),
                "no {word:?} in {:?}",
                self.errors
            );
        }
    }
}
