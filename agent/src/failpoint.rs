//! Places at which tests kill the agent.

/// Ends the agent as `kill -9` does if the environment's `FAILPOINTS` says `ACTOR:PLACE=return`, as the
/// crate `fail` has it. Only in programs that are built with the feature `failpoints` and without
/// optimization.
#[cfg(all(feature = "failpoints", debug_assertions))]
pub fn failpoint(actor: &str, place: &str) {
    fail::fail_point!(&format!("{actor}:{place}"), |_| {
        let _ =
            rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    });
}

/// Nothing.
#[cfg(not(all(feature = "failpoints", debug_assertions)))]
pub fn failpoint(_actor: &str, _place: &str) {}

/// Reads `FAILPOINTS`.
pub fn arm_failpoints() {
    #[cfg(all(feature = "failpoints", debug_assertions))]
    std::mem::forget(fail::FailScenario::setup());
}
