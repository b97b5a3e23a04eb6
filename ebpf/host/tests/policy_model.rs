//! Any frame and any rules: the programs, run by the kernel through BPF_PROG_TEST_RUN, say what a
//! plain model of the policy says, for the same reason.

mod agreement;
mod model;
mod network;
mod recipe;

use std::net::IpAddr;

use agreement::{count, is_question, programs_say, rules};
use keelson_ebpf::{
    Answers, Datapath, Direction, DropReason, HookChoice, InterfacePolicy, MacAddress, Protocol,
    Service, ServiceBackend,
};
use model::{Allowed, Model, sums};
use network::Network;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use recipe::{Choices, Recipe};

/// Services on the addresses that recipes use, each with some of the same backends, or with none.
fn services(choices: &mut Choices<'_>, policy: &InterfacePolicy) -> Vec<Service> {
    let mut services = Vec::new();
    for (protocol, port) in [
        (Protocol::Tcp, 80),
        (Protocol::Tcp, 53),
        (Protocol::Udp, 80),
    ] {
        for address in recipe::SERVICE_ADDRESSES {
            let address: IpAddr = address.parse().expect("valid");
            let own = match address {
                IpAddr::V4(_) => policy.ipv4.map(IpAddr::from),
                IpAddr::V6(_) => policy.ipv6.map(IpAddr::from),
            };
            let others = match address {
                IpAddr::V4(_) => ["10.77.0.102", "10.77.0.103"],
                IpAddr::V6(_) => ["fd77::66", "fd77::67"],
            };
            let others = others.map(|other| other.parse::<IpAddr>().expect("valid"));
            let ends = [(others[0], 2, 80), (others[1], 3, 53), (others[0], 2, 81)];
            let ends = ends.into_iter().chain(own.map(|own| (own, 1, 80)));
            let chosen = *choices.of(&[15, 15, 14, 0, 9, 8, 8, 11]);
            let drain = *choices.of(&[15, 8, 4, 2, 1, 0, 0, 0]);
            let backends = ends
                .enumerate()
                .filter(|(place, _)| chosen >> place & 1 == 1);
            let backends = backends.map(|(place, (address, number, port))| {
                let backend = ServiceBackend {
                    address,
                    port,
                    mac: MacAddress([0x52, 0x54, 0, 0, 0, number]),
                };
                (drain >> place & 1 == 1, backend)
            });
            let (draining, backends): (Vec<_>, Vec<_>) = backends.partition(|(drains, _)| *drains);
            let without = |backends: Vec<(bool, _)>| backends.into_iter().map(|(_, one)| one);
            services.push(Service {
                network: 7,
                address,
                protocol,
                port,
                backends: without(backends).collect(),
                draining: without(draining).collect(),
            });
        }
    }
    services
}

/// A packet, and sometimes other rules before it.
type Step = (bool, [u8; 32]);

/// What became of a packet.
struct Seen {
    direction: Direction,
    said: Result<Allowed, DropReason>,
    /// If it was translated: whether it was an ICMP error, whether it went back to its sender.
    translated: Option<(bool, bool)>,
}

fn check_steps(
    datapath: &mut Datapath,
    base: &InterfacePolicy,
    steps: &[Step],
    focus: usize,
    seen: &mut Vec<Seen>,
) {
    let interface = &base.name;
    datapath.detach(interface).expect("detached");
    let mut policy = rules(&mut Choices::new(&steps[0].1), base, focus);
    datapath.attach(&policy).expect("attached");
    let mut model = Model::new(&policy, vec![recipe::NEIGHBOUR_MAC]);
    let first = services(&mut Choices::new(&[15; 8]), base);
    datapath.set_services(&first).expect("valid");
    model.set_services(&first);
    let mut earlier: Option<Recipe> = None;
    let (step, at) = if focus > 4 { (16, 12) } else { (8, 4) };
    for (index, (changes, bytes)) in steps.iter().enumerate() {
        let mut choices = Choices::new(bytes);
        if *changes && index % step == at {
            let services = services(&mut choices, base);
            datapath.set_services(&services).expect("valid");
            model.set_services(&services);
            continue;
        }
        if *changes && index % 4 == 0 {
            policy = rules(&mut choices, &policy, focus);
            datapath.update(&policy).expect("updated");
            model.update(&policy);
            continue;
        }
        let kinds = if focus > 4 { 8 } else { 5 };
        let recipe = match (choices.below(kinds), &earlier) {
            (2 | 3, Some(earlier)) => earlier.answer(&mut choices),
            (4..6, Some(earlier)) => match earlier.error(&mut choices, base) {
                Some(error) => error,
                None => continue,
            },
            _ => {
                let is_to_service = choices.below(8) < focus;
                Recipe::choose(&mut choices, base, is_to_service)
            }
        };
        let mut next = Some(recipe);
        while let Some(recipe) = next.take() {
            let became = check_frame(datapath, &mut model, &policy, &recipe, seen);
            // What a guest sends to itself comes back to it.
            let is_hairpin = recipe.direction == Direction::FromGuest
                && became.frame()[..6] == base.mac.0
                && became.frame()[6..12] == recipe::SERVICE_MAC;
            if is_hairpin {
                next = Some(became.arrived());
            }
            earlier = Some(became);
        }
    }
}

/// Both say the same of a frame, and make the same of it; that.
fn check_frame(
    datapath: &mut Datapath,
    model: &mut Model,
    policy: &InterfacePolicy,
    recipe: &Recipe,
    seen: &mut Vec<Seen>,
) -> Recipe {
    let frame = recipe.frame();
    let direction = recipe.direction;
    let (said, after) = programs_say(datapath, &policy.name, direction, &frame);
    let (expected, expected_frame) = model.judge(direction, &frame, &after);
    let expected = expected.map(|()| model.allowed_by());
    assert_eq!(
        said, expected,
        "{direction:?}, frame {frame:02x?}, then {after:02x?}, ingress {:?}, egress {:?}",
        policy.ingress, policy.egress
    );
    let is_error = after.get(23) == Some(&1) || after.get(20) == Some(&58);
    let is_hairpin = after[..6] == policy.mac.0;
    let is_translated = said.is_ok() && after != frame && !is_question(direction, &frame);
    seen.push(Seen {
        direction,
        said,
        translated: is_translated.then_some((is_error, is_hairpin)),
    });
    // Questions for others' Ethernet addresses are answered in place.
    if said.is_err() || is_question(direction, &frame) {
        return recipe.clone();
    }
    assert_eq!(
        sums::without_sums(&after),
        sums::without_sums(&expected_frame),
        "{direction:?}, frame {frame:02x?}, then {after:02x?}"
    );
    assert_eq!(
        sums::deviations(&after),
        sums::deviations(&frame),
        "{direction:?}, frame {frame:02x?}, then {after:02x?}"
    );
    recipe.become_frame(after)
}

/// How many of eight packets that are no answers are for a service.
fn agree(isolated: bool, has_ipv6: bool, answers: Answers, focus: usize) -> Vec<Seen> {
    let network = Network::new(HookChoice::Auto);
    let mut datapath = network.open();
    let guest = network.guest(1);
    let neighbour = network.guest(2);
    let other = InterfacePolicy {
        network: 7,
        ..neighbour.policy()
    };
    assert_eq!(other.mac.0, recipe::NEIGHBOUR_MAC);
    datapath.attach(&other).expect("attached");
    let base = InterfacePolicy {
        ipv6: has_ipv6.then(|| "fd77::65".parse().expect("valid")),
        network: 7,
        isolated,
        answers,
        ..guest.policy()
    };
    let steps = prop::collection::vec((prop::bool::weighted(0.3), any::<[u8; 32]>()), 1..80);
    let mut runner = TestRunner::new(Config {
        cases: if focus > 4 { 80 } else { 48 },
        failure_persistence: None,
        max_shrink_iters: 200,
        ..Config::default()
    });
    let state = std::cell::RefCell::new((datapath, Vec::new()));
    let result = runner.run(&steps, |steps| {
        let (datapath, seen) = &mut *state.borrow_mut();
        check_steps(datapath, &base, &steps, focus, seen);
        Ok(())
    });
    if let Err(error) = result {
        panic!("{error}");
    }
    state.into_inner().1
}

fn count_outcomes(seen: &[Seen]) {
    let outcomes = seen.iter().map(|seen| {
        let said = seen.said.map(|counter| counter.is_some());
        (seen.direction as u32, said.map_err(DropReason::as_str))
    });
    let expected = [0, 1].into_iter().flat_map(|direction| {
        let said = [Ok(false), Ok(true), Err("not-allowed"), Err("malformed")];
        said.map(|said| (direction, said))
    });
    count(outcomes, &expected.collect::<Vec<_>>(), 4);
}

#[test]
fn the_programs_agree_with_the_model() {
    let answers = Answers {
        dhcp: true,
        solicitations: true,
    };
    count_outcomes(&agree(false, true, answers, 1));
}

#[test]
fn the_programs_agree_with_the_model_about_an_isolated_guest_without_ipv6() {
    count_outcomes(&agree(true, false, Answers::default(), 1));
}

#[test]
fn the_programs_agree_with_the_model_about_services() {
    let seen = agree(false, true, Answers::default(), 7);
    let translated = seen.iter().filter_map(|seen| {
        let (is_error, is_hairpin) = seen.translated?;
        Some((seen.direction as u32, is_error, is_hairpin))
    });
    let errors = [0, 1].map(|direction| (direction, true, direction == 1));
    let packets = [(0, false, false), (0, false, true), (1, false, true)];
    count(translated.clone(), &packets, 5);
    count(translated, &errors, 2);
    let reasons = seen.iter().filter_map(|seen| seen.said.err());
    count(
        reasons.map(DropReason::as_str),
        &["no-service", "no-backend"],
        3,
    );
}
