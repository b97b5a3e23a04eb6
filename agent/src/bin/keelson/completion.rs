//! `keelson completion`

use std::io::Write as _;

use clap::Args;
use clap_complete::Shell;

use crate::failure::Failure;

/// Print a script that completes this program's command lines in a shell.
///
/// For bash: `source <(keelson completion bash)`.
#[derive(Args)]
pub struct Completion {
    /// The shell.
    #[arg(value_enum)]
    shell: Shell,
}

impl Completion {
    /// Prints the script for `program`.
    pub fn run(self, program: &mut clap::Command) -> Result<(), Failure> {
        // It would panic where standard output is closed.
        let mut script = Vec::new();
        clap_complete::generate(self.shell, program, "keelson", &mut script);
        std::io::stdout()
            .write_all(&script)
            .map_err(|error| anyhow::Error::from(error).into())
    }
}
