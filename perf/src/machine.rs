//! What is measured on.

/// Processors and kernel of this machine.
pub fn describe() -> String {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let info = read("/proc/cpuinfo");
    // Not those that this process may run on: it may be kept to some of them.
    let processors = info
        .lines()
        .filter(|line| line.starts_with("processor"))
        .count();
    let model = info
        .lines()
        .find_map(|line| line.strip_prefix("model name"))
        .map(|line| line.trim_start_matches([' ', '\t', ':']).to_owned())
        .unwrap_or_default();
    let plural = if processors == 1 { "" } else { "s" };
    format!(
        "{model}, {processors} processor{plural}, Linux {}",
        read("/proc/sys/kernel/osrelease").trim()
    )
}
