//! A guest boots, sees what it was configured to have, and powers off.

use keelson_vmm_tests::GuestBuilder;
use serde_json::json;

#[test]
fn a_guest_boots_and_powers_off() {
    let ended = GuestBuilder::new("hello").run();
    ended.assert_passed();
    ended.line("payload: hello ok");
}

#[test]
fn a_guest_that_does_nothing_powers_off_as_well() {
    GuestBuilder::new("").run().line("payload: done passed=0");
}

#[test]
fn a_failing_step_is_reported() {
    let ended = GuestBuilder::new("hello no-such-step hello").run();
    ended.line("payload: FAIL step=no-such-step");
    ended.line("payload: done passed=1 failed=1");
}

#[test]
fn the_acpi_tables_name_every_vcpu() {
    let ended = GuestBuilder::new("cpus").set("/vcpus", 4).run();
    ended.assert_passed();
    ended.line("payload: cpus ok count=4");
}

#[test]
fn the_memory_map_holds_the_configured_memory() {
    const MIB: u64 = 1 << 20;
    for size in [64, 256, 4096] {
        let ended = GuestBuilder::new("hello")
            .set("/memory/size_mib", size)
            .run();
        ended.assert_passed();
        let line = ended.line("payload: hello ok memory=");
        let bytes = line
            .split(['=', ' '])
            .nth(4)
            .and_then(|number| number.parse::<u64>().ok());
        // Less the 384 KiB below 1 MiB that aren't RAM on a PC.
        let range = (size - 1) * MIB..=size * MIB;
        assert!(
            bytes.is_some_and(|bytes| range.contains(&bytes)),
            "{size} MiB: {line}"
        );
    }
}

#[test]
fn the_initrd_arrives_whole() {
    let contents: Vec<u8> = (0..1_234_567_u32)
        .map(|n| n.wrapping_mul(2_654_435_761).to_be_bytes()[0])
        .collect();
    let hash = contents
        .iter()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
        });
    let builder = GuestBuilder::new("initrd");
    let path = builder.directory().join("initrd");
    std::fs::write(&path, &contents).expect("the initrd can be written");
    let ended = builder.set("/kernel/initrd", path.to_str()).run();
    ended.assert_passed();
    ended.line(&format!(
        "payload: initrd ok bytes={} fnv1a={hash:016x}",
        contents.len()
    ));
}

#[test]
fn the_timer_wakes_a_halted_guest() {
    let ended = GuestBuilder::new("idle:ms=50 busy:ms=20 idle:ms=50").run();
    ended.assert_passed();
}

#[test]
fn the_pci_bus_holds_a_host_bridge_and_the_entropy_device() {
    let ended = GuestBuilder::new("pci").run();
    ended.assert_passed();
    ended.line("payload: pci function slot=0");
    ended.line("payload: pci function slot=1 vendor=0x1af4 device=0x1044");
}

#[test]
fn sixty_four_vcpus_are_arranged_as_configured() {
    for topology in [json!(null), json!({"sockets": 4, "cores": 8, "threads": 2})] {
        let ended = GuestBuilder::new("cpus")
            .set("/vcpus", 64)
            .set("/cpu", json!({"topology": topology}))
            .run();
        ended.assert_passed();
        assert_eq!(ended.line("payload: cpus"), "payload: cpus ok count=64");
    }
}

#[test]
fn memory_can_be_prefaulted_pinned_and_bound() {
    let ended = GuestBuilder::new("hello")
        .set("/memory/prefault", true)
        .set("/memory/numa_node", 0)
        .set("/cpu", json!({"pinning": [[0]]}))
        .run();
    ended.assert_passed();
}
