//! What the agent says at its start, to people and to systemd.

use std::os::unix::net::UnixDatagram;

use keelson_agent_tests::Host;
use keelson_vmm_tests::wait_until;

#[test]
fn a_host_without_kvm_is_refused() {
    let host = Host::without_agent();
    host.namespaces.hide_kvm();
    host.refused_agent()
        .refused(1, &["no /dev/kvm", "kvm_intel or kvm_amd"]);
}

#[test]
fn an_unknown_setting_is_refused() {
    let host = Host::without_agent();
    host.configure("colour = \"blue\"\n");
    host.refused_agent()
        .refused(1, &["keelsond.toml", "colour"]);
}

#[test]
fn a_state_store_that_is_no_url_is_refused() {
    let host = Host::without_agent();
    let text = std::fs::read_to_string(host.path("keelsond.toml")).expect("it is there");
    let text = text.replace("embedded:", "nowhere:");
    std::fs::write(host.path("keelsond.toml"), text).expect("it can be written");
    host.refused_agent().refused(1, &["nowhere:", "embedded:"]);
}

#[test]
fn a_second_agent_is_refused_and_the_first_lives() {
    let mut host = Host::new();
    let said = host.refused_agent();
    assert_eq!(said.code, Some(1), "{}", said.errors);
    assert!(host.agent_lives());
    host.keelson(&["host"]).done();
}

#[test]
fn pins_that_have_no_place_are_told() {
    let host = Host::without_agent();
    let text = std::fs::read_to_string(host.path("keelsond.toml")).expect("it is there");
    let pins = host.path("pins");
    std::fs::create_dir(&pins).expect("a folder can be made");
    let start = text.find("bpf_directory").expect("it is there");
    let text = format!("{}bpf_directory = \"{}\"\n", &text[..start], pins.display());
    std::fs::write(host.path("keelsond.toml"), text).expect("it can be written");
    host.refused_agent().refused(1, &["bpf", "mount"]);
}

#[test]
fn systemd_is_told_and_its_watchdog_fed() {
    let host = Host::without_agent();
    let path = host.path("notify.sock");
    let socket = UnixDatagram::bind(&path).expect("a socket can be bound");
    socket
        .set_read_timeout(Some(std::time::Duration::from_mins(1)))
        .expect("a time limit can be set");
    let mut agent = host
        .agent_command()
        .env("NOTIFY_SOCKET", &path)
        .env("WATCHDOG_USEC", "600000")
        .spawn()
        .expect("keelsond starts");
    let receive = || {
        let mut buffer = [0; 256];
        let length = socket.recv(&mut buffer).expect("it says something");
        String::from_utf8_lossy(&buffer[..length]).into_owned()
    };
    let mut said = String::new();
    while !said.contains("READY=1") {
        said.push_str(&receive());
    }
    for _ in 0..3 {
        while !receive().contains("WATCHDOG=1") {}
    }
    let id = rustix::process::Pid::from_raw(agent.id().cast_signed()).expect("not zero");
    rustix::process::kill_process(id, rustix::process::Signal::TERM).expect("it is there");
    while !receive().contains("STOPPING=1") {}
    let status = wait_until("its end", || {
        agent.try_wait().expect("a child can be asked for")
    });
    assert_eq!(status.code(), Some(0));
}

#[test]
fn its_health_is_served() {
    use tonic_health::pb::health_client::HealthClient;
    use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus};

    let host = Host::new();
    let socket = host.path("run/keelsond.sock");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime can be built");
    let status = runtime.block_on(async move {
        let connect = tower::service_fn(move |_| {
            let socket = socket.clone();
            async move {
                let stream = tokio::net::UnixStream::connect(socket).await?;
                Ok::<_, std::io::Error>(hyper_util::rt::TokioIo::new(stream))
            }
        });
        let channel = tonic::transport::Endpoint::from_static("http://agent")
            .connect_with_connector(connect)
            .await
            .expect("the agent listens");
        let mut client = HealthClient::new(channel);
        let answer = client.check(HealthCheckRequest::default()).await;
        answer.expect("it answers").into_inner().status()
    });
    assert_eq!(status, ServingStatus::Serving);
}

#[test]
fn a_client_without_an_agent_says_so() {
    let host = Host::without_agent();
    host.keelson(&["get", "vm"])
        .refused(6, &["can't be reached", "keelsond"]);
}
