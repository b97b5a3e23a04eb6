//! Why a thread can't be restricted.

/// Why a thread can't be restricted. It must not go on then.
#[derive(Debug, thiserror::Error)]
pub enum RestrictError {
    /// Landlock refused.
    #[error("can't restrict its files by Landlock: {0}")]
    Files(#[from] landlock::RulesetError),
    /// The list of system calls can't be compiled.
    #[error("can't compile its list of system calls: {0}")]
    List(#[from] seccompiler::BackendError),
    /// The kernel refused the list of system calls.
    #[error("can't restrict its system calls by seccomp: {0}")]
    SystemCalls(#[from] seccompiler::Error),
}
