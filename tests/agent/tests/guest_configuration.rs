//! Stock clients configure themselves behind a TAP device of the agent's, with its programs attached:
//! busybox's and ISC's DHCP clients, systemd-networkd, and the kernel by itself.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use keelson_agent::config::Config;
use keelson_agent::host::{GuestPort, HostNetwork, Rules};
use keelson_api::{InterfaceLimits, MacAddress, NetworkSpec};
use keelson_vmm_tests::Namespaces;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::process::Command;
use tokio::runtime::Runtime;

const MAC: MacAddress = MacAddress([0x02, 0, 0, 0, 0, 0x10]);
const NETWORKD: &str = "/usr/lib/systemd/systemd-networkd";
/// How long something that must happen may take on a busy machine.
const PATIENCE: Duration = Duration::from_mins(1);

/// A host with one network, and a guest: a network namespace behind the guest's TAP device.
struct Host {
    folder: TempDir,
    network: Option<HostNetwork>,
    _pump: Pump,
    _namespaces: Namespaces,
}

/// Carries frames between the guest's TAP device on the host and the one in the guest, as a VMM does.
struct Pump {
    ends: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Pump {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Pump {
    fn start(one: File, other: File) -> Self {
        let ends = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&ends);
        let thread = std::thread::spawn(move || {
            let mut buffer = vec![0; 1 << 17];
            while !told.load(Ordering::Relaxed) {
                let mut polls = [&one, &other].map(|tap| PollFd::new(tap, PollFlags::IN));
                let limit = Timespec {
                    tv_sec: 0,
                    tv_nsec: 100_000_000,
                };
                let _ = poll(&mut polls, Some(&limit));
                for (from, to) in [(&one, &other), (&other, &one)] {
                    while let Ok(length) = { from }.read(&mut buffer) {
                        // A device that is down takes nothing.
                        let _ = { to }.write(&buffer[..length]);
                    }
                }
            }
        });
        Self {
            ends,
            thread: Some(thread),
        }
    }
}

fn open_tap(name: &str) -> File {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .expect("/dev/net/tun can be opened");
    // SAFETY: all bytes zero are a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = i16::try_from(flags).expect("small");
    // SAFETY: TUNSETIFF reads and writes one ifreq, which lives through the call.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    let error = std::io::Error::last_os_error();
    assert_eq!(result, 0, "cannot open {name}: {error}");
    rustix::io::ioctl_fionbio(file.as_fd(), true).expect("it can be non-blocking");
    file
}

impl Host {
    /// A host whose network is as `spec` says, and its guest, whose device is up.
    async fn new(spec: &Value) -> Self {
        let namespaces = Namespaces::enter_for_agent();
        // Namespaces by name, and what networkd and clients keep there, are this test's own.
        namespaces_run("mount", &["-t", "tmpfs", "tmpfs", "/run"]);
        namespaces.ip(&["netns", "add", "guest"]);
        let folder = TempDir::new().expect("there is a place for temporary files");
        let spec: NetworkSpec = serde_json::from_value(spec.clone()).expect("a network");
        let port = port(spec);
        let network = open_network(&port).await;
        let outside = open_tap(&port.device());
        let inside = open_tap("guest0");
        let mac = MAC.to_string();
        namespaces.ip(&["link", "set", "guest0", "address", &mac, "netns", "guest"]);
        let host = Self {
            folder,
            network: Some(network),
            _pump: Pump::start(outside, inside),
            _namespaces: namespaces,
        };
        host.guest("ip link set lo up && ip link set guest0 name eth0 && ip link set eth0 up")
            .await;
        host
    }

    /// Runs a shell command in the guest; its output.
    async fn guest(&self, command: &str) -> String {
        let (status, output) = self.try_guest(command).await;
        assert!(status, "{command}: {output}");
        output
    }

    async fn try_guest(&self, command: &str) -> (bool, String) {
        let mut guest = self.guest_command(command);
        let running = guest.kill_on_drop(true).output();
        let output = tokio::time::timeout(PATIENCE, running).await;
        let output = output
            .unwrap_or_else(|_| panic!("{command}: it does not end"))
            .expect("ip can be run");
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text).into_owned();
        (output.status.success(), text)
    }

    fn guest_command(&self, command: &str) -> Command {
        let mut guest = Command::new("ip");
        guest
            .args(["netns", "exec", "guest", "sh", "-c", command])
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .current_dir(self.folder.path())
            .stdin(Stdio::null());
        guest
    }

    /// Waits until a command in the guest says all of `words`.
    async fn guest_says(&self, command: &str, words: &[&str]) -> String {
        let begin = std::time::Instant::now();
        loop {
            let (_, said) = self.try_guest(command).await;
            if words.iter().all(|word| said.contains(word)) {
                return said;
            }
            assert!(
                begin.elapsed() < PATIENCE,
                "{command} does not say {words:?}: {said}\n{}",
                self.try_guest("ip address; ip -6 route").await.1
            );
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// A script that clients run: it keeps what they were told in a file of the event's name.
    fn script(&self, body: &str) -> PathBuf {
        let path = self.folder.path().join("script");
        let folder = self.folder.path().display();
        let text = format!("#!/bin/sh\nenv | sort > {folder}/$1$reason\n{body}\n");
        fs::write(&path, text).expect("a file can be written");
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        fs::set_permissions(&path, mode).expect("its mode can be set");
        path
    }

    fn told(&self, event: &str) -> String {
        let path = self.folder.path().join(event);
        fs::read_to_string(&path).unwrap_or_else(|error| panic!("{event}: {error}"))
    }

    /// Whether the agent dropped nothing that the guest sent.
    async fn dropped_nothing(&self) {
        let network = self.network.as_ref().expect("it runs");
        let (_, counters) = network.counters("web", "eth0").await.expect("it counts");
        let dropped = &counters.from_guest.dropped;
        assert!(dropped.is_empty(), "{dropped:?}");
    }
}

fn namespaces_run(program: &str, arguments: &[&str]) {
    let status = std::process::Command::new(program).args(arguments).status();
    assert!(
        status.expect("it can be run").success(),
        "{program} {arguments:?}"
    );
}

async fn open_network(port: &GuestPort) -> HostNetwork {
    let config = Config {
        bpf_directory: Path::new("/sys/fs/bpf/keelson-guest-configuration").into(),
        ..Config::default()
    };
    let network = HostNetwork::open(&config).await.expect("the network opens");
    let made = network.ensure_network("lan", &port.network_spec).await;
    made.expect("the bridge can be made");
    network
        .ensure_port(port)
        .await
        .expect("the device can be made");
    network
}

/// The guest's interface, with the addresses that admission gives it.
fn port(spec: NetworkSpec) -> GuestPort {
    GuestPort {
        guest: "web".into(),
        interface: "eth0".into(),
        network: "lan".into(),
        mac: MAC,
        address: spec.subnet.map(|_| "10.77.0.9".parse().expect("valid")),
        address_v6: spec
            .slaac_address(MAC)
            .or(spec.subnet_v6.map(|_| "fd77::9".parse().expect("valid"))),
        limits: InterfaceLimits::default(),
        rules: Rules::default(),
        several_queues: false,
        network_spec: spec,
    }
}

fn dual_stack() -> Value {
    json!({
        "subnet": "10.77.0.0/24",
        "subnetV6": "fd77::/64",
        "mtu": 1400,
        "leaseTime": "1h",
        "dns": {"servers": ["10.77.0.53", "fd77::53"], "searchDomains": ["corp.example", "example"]},
        "routes": [{"destination": "10.0.0.0/8", "via": "10.77.0.254"}, {"destination": "fd00:8::/48"}],
    })
}

/// A runtime whose tasks answer while it runs a test, and end with it: all on this thread, whose
/// namespaces are the host's.
fn runtime() -> Runtime {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    runtime.enable_all().build().expect("a runtime")
}

#[test]
fn udhcpc_configures_a_guest() {
    runtime().block_on(async {
        let host = Host::new(&dual_stack()).await;
        let script = host.script(
            "[ $1 = bound ] || exit 0\nip address add $ip/$mask dev $interface\n\
             ip link set $interface mtu $mtu\nip route add default via $router",
        );
        let client = format!(
            "busybox udhcpc -f -n -q -i eth0 -O search -O staticroutes -O mtu -s {}",
            script.display()
        );
        host.guest(&client).await;
        let told = host.told("bound");
        for line in [
            "ip=10.77.0.9",
            "mask=24",
            "router=10.77.0.1",
            "serverid=10.77.0.1",
            "dns=10.77.0.53",
            "domain=corp.example",
            "search=corp.example example",
            "hostname=web",
            "lease=3600",
            "mtu=1400",
            "staticroutes=10.0.0.0/8 10.77.0.254 0.0.0.0/0 10.77.0.1",
        ] {
            assert!(
                told.lines().any(|told| told.trim_end() == line),
                "no {line} in {told}"
            );
        }
        host.guest("busybox ping -c 1 -W 30 10.77.0.1").await;
        host.dropped_nothing().await;
    });
}

#[test]
fn an_agent_that_starts_anew_goes_on_answering() {
    let agent = runtime();
    let spec = json!({"subnet": "10.77.0.0/24"});
    let mut host = agent.block_on(Host::new(&spec));
    let script = host.script("");
    let client = format!("busybox udhcpc -f -n -q -i eth0 -s {}", script.display());
    agent.block_on(host.guest(&client));
    host.network = None;
    drop(agent);

    let agent = runtime();
    let spec = json!({"subnet": "10.77.0.0/24", "dns": {"servers": ["10.77.0.8"]}});
    let port = port(serde_json::from_value(spec).expect("a network"));
    host.network = Some(agent.block_on(open_network(&port)));
    agent.block_on(host.guest(&client));
    let told = host.told("bound");
    assert!(told.contains("dns=10.77.0.8"), "{told}");
    assert!(told.contains("ip=10.77.0.9"), "{told}");
}

#[test]
fn dhclient_configures_a_guest_of_a_network_without_ipv4() {
    runtime().block_on(async {
        let spec = json!({
            "subnetV6": "fd77::/64",
            "leaseTime": "1h",
            "dns": {"servers": ["fd77::53"], "searchDomains": ["corp.example"]},
        });
        let host = Host::new(&spec).await;
        // The kernel learns of the router by itself; its own address must be free first.
        host.guest_says(
            "ip -6 address show dev eth0 scope link",
            &["fe80::ff:fe00:10"],
        )
        .await;
        host.guest_says(
            "ip -6 address show dev eth0 -tentative",
            &["fe80::ff:fe00:10"],
        )
        .await;
        let script = host.script(
            "[ $reason = BOUND6 ] || exit 0\n\
             ip -6 address add $new_ip6_address/$new_ip6_prefixlen dev $interface nodad",
        );
        let files = host.folder.path().display();
        let client = format!(
            "dhclient -6 -1 -v -cf /dev/null -lf {files}/leases -pf {files}/pid -sf {} eth0",
            script.display()
        );
        host.guest(&client).await;
        let told = host.told("BOUND6");
        for line in [
            "new_ip6_address=fd77::9",
            "new_max_life=3600",
            "new_dhcp6_name_servers=fd77::53",
            "new_dhcp6_domain_search=corp.example.",
        ] {
            assert!(told.lines().any(|told| told == line), "no {line} in {told}");
        }
        host.guest_says("ip -6 route", &["default via fe80::", "fd77::/64 dev eth0"])
            .await;
        host.guest("busybox ping -6 -c 1 -W 30 fd77::1").await;
        host.dropped_nothing().await;
        let _ = host.try_guest(&format!("kill $(cat {files}/pid)")).await;
    });
}

#[test]
fn the_kernel_configures_a_guest_without_any_client() {
    runtime().block_on(async {
        let spec = json!({"subnetV6": "fd77::/64", "slaac": true, "mtu": 1300});
        let host = Host::new(&spec).await;
        host.guest_says(
            "ip -6 address show dev eth0 -tentative",
            &["fd77::ff:fe00:10/64"],
        )
        .await;
        host.guest_says("ip -6 route", &["default via fe80::"])
            .await;
        let mtu = host.guest("cat /proc/sys/net/ipv6/conf/eth0/mtu").await;
        assert_eq!(mtu.trim(), "1300");
        host.guest("busybox ping -6 -c 1 -W 30 fd77::1").await;
        host.dropped_nothing().await;
    });
}

/// A network that has advertisements, changed as `more` says.
fn advertised(more: &Value) -> GuestPort {
    let mut spec = json!({"subnet": "10.77.0.0/24", "subnetV6": "fd77::/64", "slaac": true});
    let fields = spec.as_object_mut().expect("fields");
    fields.extend(more.as_object().expect("fields").clone());
    fields.retain(|_, value| !value.is_null());
    port(serde_json::from_value(spec).expect("a network"))
}

impl Host {
    async fn change(&self, more: Value) {
        let network = self.network.as_ref().expect("it runs");
        let changed = network.ensure_port(&advertised(&more)).await;
        changed.expect("the device can be changed");
    }

    /// Waits until the guest has a default route, or has none, and until it has the subnet on its link, or has not.
    async fn has_routes(&self, default: bool, on_link: bool) {
        for (what, expected) in [("default", default), ("fd77::/64", on_link)] {
            let count = format!("ip -6 route show {what} | wc -l");
            let expected = if expected { "1\n" } else { "0\n" };
            self.guest_says(&count, &[expected]).await;
        }
    }
}

/// What the kernel was told and does not hold any more is taken back.
#[test]
fn the_kernel_forgets_what_no_longer_holds() {
    let address = "ip -6 address show dev eth0 scope global";
    let agent = runtime();
    let mut host = agent.block_on(async {
        let spec = json!({"subnet": "10.77.0.0/24", "subnetV6": "fd77::/64", "slaac": true});
        let host = Host::new(&spec).await;
        let own = &["fd77::ff:fe00:10/64"];
        host.guest_says(&format!("{address} -tentative"), own).await;
        host.has_routes(true, true).await;
        // The network's gateway is not the way to everywhere any more.
        host.change(json!({"defaultRoute": false})).await;
        host.has_routes(false, true).await;
        host.change(json!({})).await;
        host.has_routes(true, true).await;
        // Nothing is advertised any more: the subnet is still there.
        host.change(json!({"routerAdvertisements": false})).await;
        host.has_routes(false, true).await;
        let said = host.guest(address).await;
        assert!(
            said.contains(own[0]) && !said.contains("deprecated"),
            "{said}"
        );
        host.change(json!({})).await;
        host.has_routes(true, true).await;
        host
    });
    host.network = None;
    drop(agent);
    // An agent that starts can't know what an earlier one told.
    let agent = runtime();
    agent.block_on(async {
        let silent = advertised(&json!({"routerAdvertisements": false}));
        host.network = Some(open_network(&silent).await);
        host.has_routes(false, true).await;
        // The subnet goes: its addresses are only for what they are in use for.
        host.change(json!({})).await;
        host.has_routes(true, true).await;
        host.change(json!({"subnetV6": null, "slaac": null})).await;
        host.has_routes(false, false).await;
        let deprecated = ["fd77::ff:fe00:10/64", "deprecated"];
        host.guest_says(address, &deprecated).await;
    });
}

#[test]
fn systemd_networkd_configures_a_guest() {
    runtime().block_on(async {
        let host = Host::new(&dual_stack()).await;
        fs::create_dir_all("/run/systemd/network").expect("a folder can be made");
        fs::write(
            "/run/systemd/network/eth0.network",
            "[Match]\nName=eth0\n[Network]\nDHCP=yes\n[DHCPv4]\nUseMTU=yes\nUseDomains=yes\n\
             [DHCPv6]\nUseDomains=yes\n[IPv6AcceptRA]\nUseDomains=yes\n",
        )
        .expect("a file can be written");
        let log = host.folder.path().join("networkd.log");
        // Without a daemon of udev, which it looks for where /sys can be written.
        let command = format!(
            "mount -o remount,ro,bind /sys; SYSTEMD_LOG_LEVEL=debug exec {NETWORKD} > {} 2>&1",
            log.display()
        );
        let mut networkd = host.guest_command(&command);
        let mut networkd = networkd.kill_on_drop(true).spawn().expect("it starts");
        host.guest_says(
            "ip address show dev eth0 -tentative",
            &["10.77.0.9/24", "fd77::9/", "mtu 1400"],
        )
        .await;
        host.guest_says(
            "ip route; ip -6 route",
            &[
                "default via 10.77.0.1",
                "10.0.0.0/8 via 10.77.0.254",
                "default",
                "fd77::/64",
                "fd00:8::/48",
            ],
        )
        .await;
        host.guest_says(
            "cat /run/systemd/netif/links/*",
            &["10.77.0.53", "fd77::53", "corp.example"],
        )
        .await;
        host.guest("busybox ping -c 1 -W 30 10.77.0.1").await;
        host.guest("busybox ping -6 -c 1 -W 30 fd77::1").await;
        networkd.kill().await.expect("it can be ended");
        host.dropped_nothing().await;
    });
}
