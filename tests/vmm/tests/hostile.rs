//! Guests that break every rule: the VMM and the backend survive, and a reset makes the devices usable.

use std::time::{Duration, Instant};

use keelson_vmm_tests::{Backend, Ended, Guest, GuestBuilder, Image, Namespaces};

/// How long a guest that does whatever it likes may run, of which nobody knows how it ends.
const WILD: Duration = Duration::from_secs(4);
/// What a VMM has at most beside its guest's memory, in KiB.
const OWN_MEMORY_KIB: u64 = 64 << 10;
const GUEST_MEMORY_KIB: u64 = 64 << 10;

#[test]
fn broken_virtqueues_break_neither_backend_nor_vmm() {
    let builder = GuestBuilder::new("blk-hostile blk-verify:seed=9 blk-write:seed=10");
    let image = Image::create(4096);
    image.write_pattern(0, 4096, 9);
    let mut backend = Backend::start(image.path(), &builder.directory().join("blk.sock"), &[]);
    let ended = builder.disk("disk", &backend, false, 1).run();
    ended.assert_passed();
    assert!(backend.is_running());
    image.assert_pattern(0, 4096, 10);
}

#[test]
fn random_register_accesses_break_nothing() {
    let namespaces = Namespaces::enter();
    namespaces.tap("payload0", "10.77.0.1/24");
    for seed in 1..=3 {
        let builder = GuestBuilder::new(&format!(
            "hammer:seed={seed},rounds=1000 blk-write:seed=11 blk-verify:seed=11 \
             net-ping:address=10.77.0.2,target=10.77.0.1"
        ));
        let image = Image::create(2048);
        let socket = builder.directory().join("blk.sock");
        let mut backend = Backend::start(image.path(), &socket, &[]);
        let guest = builder.disk("disk", &backend, false, 1).interface(
            "eth0",
            "payload0",
            "52:54:00:00:00:01",
        );
        guest.run().assert_passed();
        assert!(backend.is_running(), "seed {seed}");
        image.assert_pattern(0, 2048, 11);
    }
}

#[test]
fn registers_of_the_processor_are_there_or_not_and_the_guest_goes_on() {
    let mut neighbour = Neighbour::start();
    for seed in 1..=2 {
        let steps = format!("msr-sweep:seed={seed} hello idle:ms=50");
        let ended = GuestBuilder::new(&steps).run();
        ended.assert_passed();
        let line = ended.line("payload: msr-sweep ok");
        let count = |name: &str| -> u64 {
            let (_, rest) = line.split_once(name).expect("it is there");
            let number = rest.split(' ').next().unwrap_or_default();
            number.parse().expect("a number")
        };
        assert!(count("there=") > 20 && count("missing=") > 1000, "{line}");
    }
    neighbour.is_undisturbed();
}

/// Ports, device registers wherever they are moved to, and interrupt controllers: any access may end the
/// guest, or leave it hanging, and the process that runs it answers in any case.
#[test]
fn whatever_a_guest_does_only_it_is_gone() {
    let mut neighbour = Neighbour::start();
    for seed in 1..=6 {
        let steps = format!("hammer-wild:seed={seed} msr-sweep");
        let guest = GuestBuilder::new(&steps)
            .set("/on_reboot", "exit")
            .set("/balloon", serde_json::json!({}))
            .set("/console/device", "virtio")
            .set("/panic", serde_json::json!({}))
            .set("/watchdog", serde_json::json!({}));
        let ended = let_it_run(guest.start());
        assert!(matches!(ended.code, Some(0 | 1)), "seed {seed}: {ended:#?}");
        assert!(!ended.errors.contains("panicked at"), "{ended:#?}");
    }
    neighbour.is_undisturbed();
}

/// Waits for the guest's end, and ends it if it hangs.
fn let_it_run(mut guest: Guest) -> Ended {
    guest.wait_for_line("payload: hammer-wild ready");
    let began = Instant::now();
    while guest.is_running() && began.elapsed() < WILD {
        assert!(resident_kib(&guest) < GUEST_MEMORY_KIB + OWN_MEMORY_KIB);
        std::thread::sleep(Duration::from_millis(20));
    }
    if guest.is_running() {
        // It may end just now.
        let _ = guest.client().kill();
    }
    guest.wait()
}

fn resident_kib(guest: &Guest) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", guest.process_id()));
    let status = status.unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let words = line.and_then(|line| line.split_whitespace().next());
    words.and_then(|word| word.parse().ok()).unwrap_or(0)
}

/// Another guest, which checks its memory all the time.
struct Neighbour(Guest);

impl Neighbour {
    fn start() -> Self {
        let mut guest = GuestBuilder::new("scribble hello").start();
        guest.wait_for_line("payload: scribble ready");
        Self(guest)
    }

    fn is_undisturbed(&mut self) {
        self.0.type_line("");
        self.0.wait_for_line("payload: done passed=2 failed=0");
    }
}

#[test]
fn a_guest_can_not_fill_the_log_of_its_process() {
    let ended = GuestBuilder::new("break-queue:times=600 hello").run();
    ended.assert_passed();
    let lines = ended.errors.lines();
    let broken = lines
        .filter(|line| line.contains("queue is broken"))
        .count();
    assert!((200..500).contains(&broken), "{broken} lines");
}
