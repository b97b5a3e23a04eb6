//! Places at which tests kill the agent, or hold it while they kill something else.

/// Ends the agent as `kill -9` does if the environment's `FAILPOINTS` says `ACTOR:PLACE=return`, as the
/// crate `fail` has it; with `ACTOR:PLACE=1*return(FILE)` makes the file, once, and waits until it is
/// removed. Only in programs that are built with the feature `failpoints` and without optimization.
#[cfg(all(feature = "failpoints", debug_assertions))]
pub fn failpoint(actor: &str, place: &str) {
    fail::fail_point!(&format!("{actor}:{place}"), |file: Option<String>| {
        match file {
            Some(file) => hold(std::path::Path::new(&file)),
            None => kill_itself(),
        }
    });
}

/// Nothing.
#[cfg(not(all(feature = "failpoints", debug_assertions)))]
pub fn failpoint(_actor: &str, _place: &str) {}

#[cfg(all(feature = "failpoints", debug_assertions))]
fn kill_itself() {
    let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
}

/// Other tasks go on meanwhile.
#[cfg(all(feature = "failpoints", debug_assertions))]
fn hold(file: &std::path::Path) {
    const LOOK: std::time::Duration = std::time::Duration::from_millis(5);
    if std::fs::write(file, "").is_err() {
        return;
    }
    let wait = || {
        while file.exists() {
            std::thread::sleep(LOOK);
        }
    };
    match tokio::runtime::Handle::try_current() {
        Ok(_) => tokio::task::block_in_place(wait),
        Err(_) => wait(),
    }
}

/// Reads `FAILPOINTS`.
pub fn arm_failpoints() {
    #[cfg(all(feature = "failpoints", debug_assertions))]
    std::mem::forget(fail::FailScenario::setup());
}
