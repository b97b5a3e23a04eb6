//! Any frame and any rules: the programs, run by the kernel through BPF_PROG_TEST_RUN, say what a
//! plain model of the policy says, for the same reason.

mod model;
mod network;
mod recipe;

use keelson_ebpf::{
    Answers, Datapath, Direction, DropReason, EgressPolicy, HookChoice, InterfaceCounters,
    InterfacePolicy, Protocol, Rule, Verdict,
};
use model::{Allowed, Model};
use network::Network;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use recipe::{Choices, Recipe};

/// What the programs say, with the reason that they counted, or the rule.
fn programs_say(
    datapath: &mut Datapath,
    interface: &str,
    direction: Direction,
    frame: &[u8],
) -> Result<Allowed, DropReason> {
    let of_direction = |counters: InterfaceCounters| match direction {
        Direction::FromGuest => counters.from_guest,
        Direction::ToGuest => counters.to_guest,
    };
    let before = of_direction(datapath.counters(interface).expect("attached"));
    let verdict = datapath
        .evaluate(interface, direction, frame)
        .expect("the kernel takes the frame");
    let after = of_direction(datapath.counters(interface).expect("attached"));
    let reasons: Vec<DropReason> = after
        .dropped
        .iter()
        .filter(|(reason, tally)| before.dropped.get(reason) != Some(tally))
        .map(|(reason, _)| *reason)
        .collect();
    let allowed: Vec<u64> = after
        .allowed
        .iter()
        .filter(|(counter, tally)| before.allowed.get(counter) != Some(tally))
        .map(|(counter, _)| *counter)
        .collect();
    match (verdict, reasons.as_slice(), allowed.as_slice()) {
        (Verdict::Pass, [], []) => Ok(None),
        // It went to the agent, and nowhere else.
        (Verdict::Drop, [], []) if after.passed != before.passed => Ok(None),
        (Verdict::Pass, [], [counter]) => Ok(Some(*counter)),
        (Verdict::Drop, [reason], []) => Err(*reason),
        other => panic!("one drop is counted once, and one rule: {other:?}"),
    }
}

fn rule(choices: &mut Choices<'_>) -> Rule {
    let protocols = [
        Protocol::Tcp,
        Protocol::Udp,
        Protocol::Icmp,
        Protocol::Icmpv6,
        Protocol::Any,
        Protocol::Number(132),
    ];
    let protocol = *choices.of(&protocols);
    let peers = [
        "0.0.0.0/0",
        "::/0",
        "10.77.0.0/24",
        "10.77.0.1",
        "10.77.0.102",
        "fd77::/64",
        "fd77::1",
        "fe80::/10",
    ];
    let ports = match protocol {
        Protocol::Any | Protocol::Number(_) => Rule::ALL_PORTS,
        Protocol::Icmp => Rule::icmp_type(*choices.of(&[8, 0, 3]), None),
        Protocol::Icmpv6 => Rule::icmp_type(*choices.of(&[128, 129, 1, 2]), None),
        _ => [80..=80, Rule::ALL_PORTS, 1000..=1003, 53..=80][choices.below(4)].clone(),
    };
    Rule {
        protocol,
        ports,
        peer: choices.of(&peers).parse().expect("valid"),
        counter: *choices.of(&[0, 1, 2, 3, 1 << 40]),
    }
}

fn rules(choices: &mut Choices<'_>, policy: &InterfacePolicy) -> InterfacePolicy {
    let ingress = (0..choices.below(6)).map(|_| rule(choices)).collect();
    let egress = match choices.below(3) {
        0 => EgressPolicy::AllowAll,
        _ => EgressPolicy::Only((0..choices.below(6)).map(|_| rule(choices)).collect()),
    };
    InterfacePolicy {
        ingress,
        egress,
        ..policy.clone()
    }
}

/// A packet, and sometimes other rules before it.
type Step = (bool, [u8; 24]);

fn check_steps(
    datapath: &mut Datapath,
    base: &InterfacePolicy,
    steps: &[Step],
    seen: &mut Vec<(Direction, Result<Allowed, DropReason>)>,
) {
    let interface = &base.name;
    datapath.detach(interface).expect("detached");
    let mut policy = rules(&mut Choices::new(&steps[0].1), base);
    datapath.attach(&policy).expect("attached");
    let mut model = Model::new(&policy, vec![recipe::NEIGHBOUR_MAC]);
    let mut earlier: Option<Recipe> = None;
    for (index, (changes, bytes)) in steps.iter().enumerate() {
        let mut choices = Choices::new(bytes);
        if *changes && index % 4 == 0 {
            policy = rules(&mut choices, &policy);
            datapath.update(&policy).expect("updated");
            model.update(&policy);
            continue;
        }
        let recipe = match (choices.below(5), &earlier) {
            (2 | 3, Some(earlier)) => earlier.answer(&mut choices),
            (4, Some(earlier)) => match earlier.error(&mut choices, base) {
                Some(error) => error,
                None => continue,
            },
            _ => Recipe::choose(&mut choices, base),
        };
        let frame = recipe.frame();
        let expected = model.judge(recipe.direction, &frame);
        let expected = expected.map(|()| model.allowed_by());
        let said = programs_say(datapath, interface, recipe.direction, &frame);
        assert_eq!(
            said, expected,
            "step {index}, {:?}, frame {frame:02x?}, ingress {:?}, egress {:?}",
            recipe.direction, policy.ingress, policy.egress
        );
        seen.push((recipe.direction, said));
        earlier = Some(recipe);
    }
}

fn agree(isolated: bool, has_ipv6: bool, answers: Answers) {
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
    let steps = prop::collection::vec((prop::bool::weighted(0.3), any::<[u8; 24]>()), 1..60);
    let mut runner = TestRunner::new(Config {
        cases: 48,
        failure_persistence: None,
        max_shrink_iters: 200,
        ..Config::default()
    });
    let state = std::cell::RefCell::new((datapath, Vec::new()));
    let result = runner.run(&steps, |steps| {
        let (datapath, seen) = &mut *state.borrow_mut();
        check_steps(datapath, &base, &steps, seen);
        Ok(())
    });
    if let Err(error) = result {
        panic!("{error}");
    }
    // That the two agree says little unless they had much to agree about.
    let (_, seen) = state.into_inner();
    let mut outcomes = std::collections::BTreeMap::new();
    for (direction, said) in seen {
        let said = said.map(|counter| counter.is_some());
        let key = (direction as u32, said.map_err(DropReason::as_str));
        *outcomes.entry(key).or_insert(0) += 1;
    }
    println!("{outcomes:?}");
    for direction in [Direction::FromGuest, Direction::ToGuest] {
        for said in [Ok(false), Ok(true), Err("not-allowed"), Err("malformed")] {
            let count = outcomes.get(&(direction as u32, said)).copied();
            assert!(
                count.unwrap_or(0) >= 10,
                "{direction:?} {said:?}: {count:?}"
            );
        }
    }
}

#[test]
fn the_programs_agree_with_the_model() {
    let answers = Answers {
        dhcp: true,
        solicitations: true,
    };
    agree(false, true, answers);
}

#[test]
fn the_programs_agree_with_the_model_about_an_isolated_guest_without_ipv6() {
    agree(true, false, Answers::default());
}
