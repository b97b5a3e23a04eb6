//! Which rules allow a packet.

use std::net::IpAddr;

use keelson_ebpf::{Direction, DropReason, EgressPolicy, Rule};

use super::{Model, Verdict};

impl Model {
    /// Judges a packet by the rules, and notes which one let it pass: of those that do, the one whose
    /// counter is named first.
    pub(super) fn ask_rules(
        &mut self,
        direction: Direction,
        peer: IpAddr,
        protocol: u8,
        port: u16,
    ) -> Verdict {
        let Some(rules) = self.rules(direction) else {
            return Ok(());
        };
        let allowing: Vec<u64> = rules
            .iter()
            .filter(|rule| rule.allows(peer, protocol, port))
            .map(|rule| rule.counter)
            .collect();
        let named = rules.iter().map(|rule| rule.counter);
        let first = named.into_iter().find(|counter| allowing.contains(counter));
        let first = first.ok_or(DropReason::NotAllowed)?;
        self.allowed_by = (first != 0).then_some(first);
        Ok(())
    }

    fn rules(&self, direction: Direction) -> Option<&[Rule]> {
        match (direction, &self.policy.egress) {
            (Direction::ToGuest, _) => Some(&self.policy.ingress),
            (Direction::FromGuest, EgressPolicy::Only(rules)) => Some(rules),
            (Direction::FromGuest, EgressPolicy::AllowAll) => None,
        }
    }

    pub(super) fn rules_allow(
        &self,
        direction: Direction,
        peer: IpAddr,
        protocol: u8,
        port: u16,
    ) -> bool {
        let Some(rules) = self.rules(direction) else {
            return true;
        };
        rules.iter().any(|rule| rule.allows(peer, protocol, port))
    }
}
