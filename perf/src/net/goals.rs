//! The goals that follow from the samples.

use super::hosts::Peer;
use super::load::Work;
use super::{PROGRAMS, RULES, label};
use crate::report::{Goal, Report, Wanted};

/// Nanoseconds that a program may take for a packet of an established flow.
const PROGRAM_GOAL_NS: f64 = 150.0;

/// Adds them all, as far as what they are about was measured.
pub fn add_goals(report: &mut Report) {
    let ours = Peer::Keelson.name();
    for rules in [1_000, 100_000] {
        report.goal(
            format!("packets per second of bridge and nftables, {rules} rules"),
            (ours, Peer::Nftables.name()),
            &label(Work::Packets.name(), rules),
            "packets_per_s",
            Wanted::AtLeast(2.0),
        );
    }
    add_flatness(report);
    for (name, _) in PROGRAMS {
        let of = |figure| report.figure(ours, &label(name, 1_000), figure);
        let counted = of("counted_ns").zip(of("counting_ns"));
        let counted = counted.map(|(counted, counting)| counted - counting);
        for (how, measured) in [
            ("by itself", of("program_ns")),
            ("under load, without the counting", counted),
        ] {
            if let Some(measured) = measured {
                report.goals.push(Goal {
                    name: format!("{name}, established flow, {how}"),
                    goal: format!("under {PROGRAM_GOAL_NS:.0}"),
                    measured,
                    unit: "ns",
                    spread: (measured, measured),
                    met: measured < PROGRAM_GOAL_NS,
                });
            }
        }
    }
    add_throughput(report);
}

/// From 10 to 100,000 rules: the ratio of the slowest to the fastest in packets per second.
fn add_flatness(report: &mut Report) {
    let ours = Peer::Keelson.name();
    for (figure, name) in [
        ("packets_per_s", "packets per second"),
        ("cpu_ns_per_packet", "CPU per packet"),
    ] {
        let values: Vec<f64> = RULES[1..]
            .iter()
            .filter_map(|rules| report.figure(ours, &label(Work::Packets.name(), *rules), figure))
            .collect();
        let least = values.iter().copied().fold(f64::INFINITY, f64::min);
        let most = values.iter().copied().fold(0.0, f64::max);
        if values.len() == RULES.len() - 1 && most > 0.0 {
            report.goals.push(Goal {
                name: format!("{name}, smallest to largest from 10 to 100,000 rules"),
                goal: "at least 0.95".into(),
                measured: least / most,
                unit: "of the largest",
                spread: (least / most, least / most),
                met: least / most >= 0.95,
            });
        }
    }
}

/// Our throughput with 1,000 rules beside that of the bridge without policy, which has no rules.
fn add_throughput(report: &mut Report) {
    let of = |peer: Peer, rules| {
        report.figure(
            peer.name(),
            &label(Work::Throughput.name(), rules),
            "gigabits_per_s",
        )
    };
    if let (Some(ours), Some(limit)) = (of(Peer::Keelson, 1_000), of(Peer::Bridge, 0)) {
        report.goals.push(Goal {
            name: "TCP throughput of no policy, 1,000 rules".into(),
            goal: "at least 0.90".into(),
            measured: ours / limit,
            unit: "times the peer's",
            spread: (ours / limit, ours / limit),
            met: ours / limit >= 0.9,
        });
    }
}
