//! Guests that break every rule: the VMM and the backend survive, and a reset makes the devices usable.

use keelson_vmm_tests::{Backend, GuestBuilder, Image, Namespaces};

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
