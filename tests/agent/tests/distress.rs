//! What goes wrong around guests: ones that end again and again, a thousand objects at once, no room.

use std::fmt::Write as _;
use std::fs;
use std::process::Command;
use std::time::Duration;

use keelson_agent_tests::{Guest, Host, disk};
use keelson_vmm_tests::wait_until;

#[test]
fn a_guest_that_ends_again_and_again_is_started_ever_more_seldom() {
    let mut host = Host::new();
    let manifest = format!(
        "{}{}",
        Guest::new("loops", "triple-fault").manifest(),
        Guest::new("good", "hang").manifest()
    );
    host.apply(&manifest).done();
    host.wait_for_phase("good", "Running");
    let good = host.object("vm", "good")["status"]["processId"].clone();
    // It is started again after 1, 2, 4 and then 8 s.
    let status = host.wait_for_status("loops", "its fourth end", |status| {
        status["restarts"].as_u64() >= Some(4)
    });
    let conditions = status["conditions"].to_string();
    assert!(conditions.contains("TripleFault"), "{conditions}");
    let events = host.keelson(&["events", "loops"]).done();
    assert!(events.contains("Ended"), "{events}");
    std::thread::sleep(Duration::from_secs(5));
    let restarts = host.object("vm", "loops")["status"]["restarts"].as_u64();
    assert!(restarts <= Some(5), "it does not wait: {restarts:?}");
    assert_eq!(host.object("vm", "good")["status"]["processId"], good);
    assert!(host.agent_lives());
    // A change of its object is reason to try at once.
    host.apply(&Guest::new("loops", "hang").manifest()).done();
    host.wait_for_phase("loops", "Running");
}

#[test]
fn a_thousand_objects_at_once_are_applied_and_harm_nobody() {
    let mut host = Host::new();
    host.apply(&Guest::new("good", "hang").manifest()).done();
    host.wait_for_phase("good", "Running");
    let good = host.object("vm", "good")["status"]["processId"].clone();
    let mut manifest = String::new();
    for at in 0..500 {
        // Before what it refers to.
        manifest += &Guest::new(&format!("guest-{at}"), "hang")
            .field("powerState: Stopped")
            .field(&format!("disks: [{{name: data, disk: disk-{at}}}]"))
            .manifest();
        let image = host.path(&format!("disk-{at}.img"));
        fs::write(&image, [0; 4096]).expect("an image can be written");
        manifest += &disk(&format!("disk-{at}"), &image);
    }
    let dry = host.path("many.yaml");
    fs::write(&dry, &manifest).expect("a file can be written");
    let dry = ["apply", "--dry-run", "-f", &dry.to_string_lossy()].map(str::to_owned);
    host.keelson(&dry).refused(1, &["dry run", "steps"]);
    let applied = host.apply(&manifest).done();
    assert_eq!(applied.matches(" created").count(), 1000);
    wait_until("all of them taken note of", || {
        let guests = host.keelson(&["get", "vm"]).done();
        (guests.matches("Stopped").count() >= 500).then_some(())
    });
    assert_eq!(host.object("vm", "good")["status"]["processId"], good);
    assert!(host.agent_lives());
    // One more than fits is refused as a whole.
    let mut many = String::new();
    for at in 0..=1000 {
        let _ = write!(many, "---\nkind: Disk\nmetadata: {{name: d{at}}}\n");
    }
    host.apply(&many).refused(4, &["1000"]);
}

#[test]
fn a_state_store_without_room_harms_no_guest_and_recovers() {
    let mut host = Host::without_agent();
    let state = host.path("state");
    fs::create_dir(&state).expect("a folder can be made");
    // In the test's own namespace: it goes with that.
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=6m", "tmpfs"])
        .arg(&state)
        .status();
    assert!(mounted.expect("mount runs").success(), "a small tmpfs");
    host.start_agent();
    host.apply(&Guest::new("web", "hang").manifest()).done();
    host.wait_for_console("web", "payload: hang ok");
    host.wait_for_phase("web", "Running");
    let before = host.object("vm", "web")["status"]["processId"].clone();

    let filler = state.join("filler");
    let _ = fs::write(&filler, vec![0; 8 << 20]);
    let refused = wait_until("a write that finds no room", || {
        let more = Guest::new("more", "hang").field("powerState: Stopped");
        let said = host.apply(&more.field(&format!("memory: {}Mi", 64)).manifest());
        let _ = host.keelson(&["delete", "vm", "more"]);
        (said.code != Some(0)).then_some(said)
    });
    assert!(
        refused.errors.to_lowercase().contains("space"),
        "{}",
        refused.errors
    );
    assert!(host.agent_lives(), "{}", host.agent_log());
    assert_eq!(host.processes("keelson-vmm").len(), 1);

    fs::remove_file(&filler).expect("the filler can be removed");
    wait_until("writes that find room again", || {
        let said = host.apply(&Guest::new("late", "hang").manifest());
        (said.code == Some(0)).then_some(())
    });
    host.wait_for_phase("late", "Running");
    assert_eq!(host.object("vm", "web")["status"]["processId"], before);
}
