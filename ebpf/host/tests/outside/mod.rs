//! Packets on their way between guests and the outside, as the programs of both and the models of both see them.

use std::collections::BTreeMap;
use std::net::IpAddr;

use keelson_ebpf::{Datapath, Direction, DropReason, InterfacePolicy, MacAddress, Tally, Verdict};

use crate::agreement::{is_question, programs_say};
use crate::model::hairpin::Turned;
use crate::model::uplink::{Outcome, Uplink};
use crate::model::{Model, sums};
use crate::recipe::{Choices, GATEWAY_MAC, Recipe};

pub const UPLINK: &str = "up0";
pub const BRIDGE: &str = "br0";
/// The uplink's addresses, by version of IP.
pub const EXTERNAL: [&str; 2] = ["192.0.2.1", "2001:db8::1"];
const GATEWAY: [&str; 2] = ["10.77.0.1", "fd77::1"];
const ROUTER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];

/// A packet that passed, where it was seen last.
#[derive(Clone)]
pub enum Seen {
    /// Outside, as the uplink sent it.
    Outside(Recipe),
    /// Inside, as it came to a guest.
    Inside(usize, Recipe),
}

/// What happened: who sent, what it was, and what became of it.
pub type Note = (&'static str, &'static str, Result<bool, &'static str>);

pub struct Trial<'a> {
    pub datapath: &'a mut Datapath,
    pub policies: Vec<InterfacePolicy>,
    pub models: Vec<Model>,
    pub uplink: Uplink,
    pub seen: Vec<Seen>,
    pub notes: &'a mut Vec<Note>,
}

impl Trial<'_> {
    pub fn step(&mut self, choices: &mut Choices<'_>) {
        let earlier = match self.seen.len() {
            0 => None,
            // The last ones most of the time.
            count => {
                let back = choices.below(4).min(count - 1);
                Some(self.seen[count - 1 - back].clone())
            }
        };
        match (choices.below(9), earlier) {
            (2 | 3, Some(Seen::Outside(sent))) => {
                let answer = sent.answer(choices);
                self.receive("answer", &answer);
            }
            (2 | 3, Some(Seen::Inside(guest, received))) => {
                let answer = received.answer(choices);
                self.send(guest, &answer);
            }
            (4 | 8, Some(Seen::Outside(sent))) => {
                if let Some(error) = sent.error(choices, &outside()) {
                    self.receive("error", &error);
                }
            }
            (4 | 8, Some(Seen::Inside(guest, received))) => {
                if let Some(error) = received.error(choices, &self.policies[guest]) {
                    if choices.rarely(2) {
                        self.report(&error);
                    } else {
                        self.send(guest, &error);
                    }
                }
            }
            (5 | 6, _) => {
                let direction = Direction::ToGuest;
                let packet = Recipe::make(choices, &outside(), direction, false);
                self.receive("stranger", &packet);
            }
            _ => {
                let guest = choices.below(self.policies.len());
                let direction = Direction::FromGuest;
                let packet = Recipe::make(choices, &self.policies[guest], direction, false);
                let packet = if choices.rarely(3) {
                    to_external(&packet)
                } else {
                    packet
                };
                self.send(guest, &packet);
            }
        }
    }

    /// A guest sends a packet: its own programs decide, then the uplink's.
    fn send(&mut self, guest: usize, packet: &Recipe) {
        let Some(frame) = self.decide(guest, packet) else {
            return;
        };
        if EXTERNAL.contains(&destination(&frame).to_string().as_str()) {
            self.turn(&frame);
            return;
        }
        let Some(sent) = self.leave(&frame) else {
            return;
        };
        let is_translated = sent != frame;
        self.note("guest", &frame, Ok(is_translated));
        if is_translated {
            self.seen.push(Seen::Outside(Recipe::new(
                Direction::FromGuest,
                sent.clone(),
            )));
            self.check_round_trip(&frame, &sent);
        }
    }

    /// A guest sends a packet to the uplink's address: it may be for a guest, or for the host.
    fn turn(&mut self, frame: &[u8]) {
        let before = self.dropped();
        let (verdict, after) = self
            .datapath
            .translate_at_gateway(BRIDGE, Direction::FromGuest, frame)
            .expect("the kernel takes the frame");
        let passed = verdict == Verdict::Pass;
        match self.uplink.turn(frame, passed.then_some(after.as_slice())) {
            Turned::ToHost => {
                assert!(passed, "{frame:02x?}");
                assert_eq!(frame, after);
                self.note("turned", frame, Ok(false));
            }
            Turned::Dropped(reason) => {
                assert!(!passed, "{frame:02x?} is {reason}, not {after:02x?}");
                assert_eq!(self.dropped_since(&before), [reason], "{frame:02x?}");
                self.note("turned", frame, Err(reason.as_str()));
            }
            Turned::To(guest, expected) => {
                assert!(passed, "{frame:02x?}");
                let mut routed = expected;
                routed[..6].copy_from_slice(&self.policies[guest].mac.0);
                routed[6..12].copy_from_slice(&frame[..6]);
                check_same(frame, &after, &routed);
                self.note("turned", frame, Ok(true));
                let arrived = Recipe::new(Direction::ToGuest, after);
                if let Some(frame) = self.decide(guest, &arrived) {
                    let received = Recipe::new(Direction::ToGuest, frame);
                    self.seen.push(Seen::Inside(guest, received));
                }
            }
        }
    }

    /// The host reports about what came to a guest.
    fn report(&mut self, error: &Recipe) {
        let mut frame = error.frame();
        let (at, own): (usize, IpAddr) = match frame[12..14] {
            [0x08, 0x00] => (26, GATEWAY[0].parse().expect("valid")),
            _ => (22, GATEWAY[1].parse().expect("valid")),
        };
        match own {
            IpAddr::V4(own) => frame[at..at + 4].copy_from_slice(&own.octets()),
            IpAddr::V6(own) => frame[at..at + 16].copy_from_slice(&own.octets()),
        }
        if let Some(sent) = self.leave(&frame) {
            self.note("host", &frame, Ok(sent != frame));
        }
    }

    /// What the uplink makes of a frame that leaves by it; `None` if it is dropped.
    fn leave(&mut self, frame: &[u8]) -> Option<Vec<u8>> {
        let before = self.dropped();
        let (verdict, after) = self.translate(Direction::FromGuest, frame);
        let passed = verdict == Verdict::Pass;
        let expected = self.uplink.send(frame, passed.then_some(after.as_slice()));
        match expected {
            Outcome::On(expected) => {
                assert_eq!(verdict, Verdict::Pass, "{frame:02x?}");
                check_same(frame, &after, &expected);
                Some(after)
            }
            Outcome::Dropped(reason) => {
                assert_eq!(verdict, Verdict::Drop, "{frame:02x?} is {reason}");
                let reasons = self.dropped_since(&before);
                assert_eq!(reasons, [reason], "{frame:02x?}");
                self.note("guest", frame, Err(reason.as_str()));
                None
            }
        }
    }

    /// What was dropped of each guest's.
    fn dropped(&self) -> Vec<BTreeMap<DropReason, Tally>> {
        let counters = self.policies.iter().map(|policy| {
            let counters = self.datapath.counters(&policy.name).expect("attached");
            counters.from_guest.dropped
        });
        counters.collect()
    }

    fn dropped_since(&self, before: &[BTreeMap<DropReason, Tally>]) -> Vec<DropReason> {
        let now = self.dropped();
        let mut reasons = Vec::new();
        for (before, now) in before.iter().zip(&now) {
            let more = now
                .iter()
                .filter(|(reason, tally)| before.get(reason) != Some(tally));
            reasons.extend(more.map(|(reason, _)| *reason));
        }
        reasons
    }

    /// A packet comes by the uplink; if it is a guest's, its programs decide.
    fn receive(&mut self, who: &'static str, packet: &Recipe) {
        let frame = packet.frame();
        let after = self.enter(&frame);
        self.note(who, &frame, Ok(after != frame));
        if after == frame {
            return;
        }
        let own = destination(&after);
        let mut policies = self.policies.iter();
        let guest = policies.position(|policy| addresses(policy).contains(&own));
        let guest = guest.expect("what is translated goes to a guest");
        let mut routed = after;
        routed[..6].copy_from_slice(&self.policies[guest].mac.0);
        routed[6..12].copy_from_slice(&GATEWAY_MAC);
        let routed = Recipe::new(Direction::ToGuest, routed);
        if let Some(frame) = self.decide(guest, &routed) {
            let received = Recipe::new(Direction::ToGuest, frame);
            self.seen.push(Seen::Inside(guest, received));
        }
    }

    /// What the uplink makes of a frame that comes by it.
    fn enter(&mut self, frame: &[u8]) -> Vec<u8> {
        let (verdict, after) = self.translate(Direction::ToGuest, frame);
        assert_eq!(verdict, Verdict::Pass, "nothing is dropped here");
        let expected = self.uplink.receive(frame);
        check_same(frame, &after, &expected);
        after
    }

    /// Runs the uplink's program, which counts what it translates.
    fn translate(&mut self, direction: Direction, frame: &[u8]) -> (Verdict, Vec<u8>) {
        let counted = |datapath: &Datapath| {
            let uses = datapath.external_use().expect("read").into_iter();
            let tallies = uses.map(|used| match direction {
                Direction::FromGuest => used.to_uplink,
                Direction::ToGuest => used.from_uplink,
            });
            tallies.fold(Tally::default(), |sum, tally| Tally {
                packets: sum.packets + tally.packets,
                bytes: sum.bytes + tally.bytes,
            })
        };
        let before = counted(self.datapath);
        let (verdict, after) = self
            .datapath
            .translate_at_uplink(UPLINK, direction, frame)
            .expect("the kernel takes the frame");
        let now = counted(self.datapath);
        let is_translated = verdict == Verdict::Pass && after != frame;
        let bytes = if is_translated { frame.len() as u64 } else { 0 };
        assert_eq!(now.packets - before.packets, u64::from(is_translated));
        assert_eq!(now.bytes - before.bytes, bytes);
        (verdict, after)
    }

    /// What is answered to what left is answered to what was sent.
    fn check_round_trip(&mut self, frame: &[u8], sent: &[u8]) {
        // Of others, recipes know no answers.
        if !matches!(kind(frame), "tcp" | "udp" | "echo") {
            return;
        }
        let [asked, seen] = [frame, sent].map(|frame| {
            let recipe = Recipe::new(Direction::FromGuest, frame.to_vec());
            recipe.answer(&mut Choices::new(&[])).frame()
        });
        let back = self.enter(&seen);
        assert_eq!(
            sums::without_sums(&back),
            sums::without_sums(&asked),
            "{frame:02x?} left as {sent:02x?}"
        );
    }

    /// What a guest's programs make of a frame; `None` if it is dropped or a question that is answered.
    fn decide(&mut self, guest: usize, packet: &Recipe) -> Option<Vec<u8>> {
        let (frame, direction) = (packet.frame(), packet.direction);
        let name = &self.policies[guest].name;
        let (said, after) = programs_say(self.datapath, name, direction, &frame);
        let model = &mut self.models[guest];
        let (expected, expected_frame) = model.judge(direction, &frame, &after);
        let expected = expected.map(|()| model.allowed_by());
        assert_eq!(said, expected, "{direction:?}, frame {frame:02x?}");
        if said.is_err() || is_question(direction, &frame) {
            return None;
        }
        check_same(&frame, &after, &expected_frame);
        Some(after)
    }

    fn note(&mut self, who: &'static str, frame: &[u8], what: Result<bool, &'static str>) {
        self.notes.push((who, kind(frame), what));
    }
}

/// The same, to the uplink's address.
fn to_external(packet: &Recipe) -> Recipe {
    let mut frame = packet.frame();
    let outside = outside();
    match (&frame[12..14], outside.ipv4, outside.ipv6) {
        ([0x08, 0x00], Some(ipv4), _) => frame[30..34].copy_from_slice(&ipv4.octets()),
        ([0x86, 0xdd], _, Some(ipv6)) => frame[38..54].copy_from_slice(&ipv6.octets()),
        _ => {}
    }
    Recipe::new(packet.direction, frame)
}

/// The frame became what it should, and its sums are as right or wrong as they were.
fn check_same(frame: &[u8], after: &[u8], expected: &[u8]) {
    assert_eq!(
        sums::without_sums(after),
        sums::without_sums(expected),
        "frame {frame:02x?}, then {after:02x?}"
    );
    assert_eq!(
        sums::deviations(after),
        sums::deviations(frame),
        "frame {frame:02x?}, then {after:02x?}"
    );
}

/// Whom strangers send to: the uplink's addresses.
fn outside() -> InterfacePolicy {
    InterfacePolicy {
        mac: MacAddress(ROUTER_MAC),
        ipv4: Some(EXTERNAL[0].parse().expect("valid")),
        ipv6: Some(EXTERNAL[1].parse().expect("valid")),
        ..InterfacePolicy::default()
    }
}

pub fn addresses(policy: &InterfacePolicy) -> Vec<IpAddr> {
    let ipv4 = policy.ipv4.map(IpAddr::from);
    ipv4.into_iter()
        .chain(policy.ipv6.map(IpAddr::from))
        .collect()
}

fn destination(frame: &[u8]) -> IpAddr {
    match frame[12..14] {
        [0x08, 0x00] => <[u8; 4]>::try_from(&frame[30..34]).expect("four").into(),
        [0x86, 0xdd] => <[u8; 16]>::try_from(&frame[38..54]).expect("16").into(),
        _ => IpAddr::from([0; 4]),
    }
}

/// What a frame is, roughly.
fn kind(frame: &[u8]) -> &'static str {
    let (protocol, payload, is_fragment) = match frame[12..14] {
        [0x08, 0x00] => (frame[23], 34, frame[20] & 0x1f != 0 || frame[21] != 0),
        [0x86, 0xdd] => (frame[20], 54, frame[20] == 44),
        _ => return "other",
    };
    match (protocol, frame.get(payload).copied()) {
        _ if is_fragment => "fragment",
        (6, _) => "tcp",
        (17, _) => "udp",
        (1, Some(0 | 8)) | (58, Some(128 | 129)) => "echo",
        (1, Some(3 | 11 | 12)) | (58, Some(0..128)) => "error",
        _ => "other",
    }
}
