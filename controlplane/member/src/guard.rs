//! What a message of another member must not be. Consensus trusts its messages, and panics on some
//! that contradict what it knows; these are refused before.

use prost::Message as _;
use raft::eraftpb::{
    ConfChange, ConfChangeType, ConfState, Entry, EntryType, Message, MessageType,
};
use raft::{Raft, StateRole, Storage};

use crate::command::Command;
use crate::member::MembershipChange;

/// Terms that another member may be ahead: each takes an election timeout.
const MAX_TERM_AHEAD: u64 = 1 << 32;
/// Log indices are less.
const MAX_INDEX: u64 = 1 << 62;

/// Why a message is refused.
pub type Refusal = &'static str;

/// Refuses what no member sends in any state: what it is, whom it names, entries that don't fit
/// together. Who sends such messages is to be cut off.
pub fn check_form(message: &Message, from: u64, to: u64) -> Result<(), Refusal> {
    let Some(kind) = MessageType::from_i32(message.msg_type) else {
        return Err("its kind is unknown");
    };
    // A follower hands on who is to lead, in the name of that member.
    let named = message.from == from || kind == MessageType::MsgTransferLeader;
    if !named || from == raft::INVALID_ID || from == to {
        return Err("it names another sender");
    }
    if message.to != to {
        return Err("it is for another member");
    }
    // What followers hand on to the leader is of any term.
    let forwarded = matches!(kind, MessageType::MsgPropose | MessageType::MsgReadIndex);
    match kind {
        MessageType::MsgHup
        | MessageType::MsgBeat
        | MessageType::MsgUnreachable
        | MessageType::MsgSnapStatus
        | MessageType::MsgCheckQuorum => return Err("it is of a kind that members don't send"),
        _ if (message.term == 0) != forwarded => return Err("it is of no term, or should be"),
        _ => {}
    }
    let indices = [message.index, message.commit, message.reject_hint];
    if indices.iter().any(|index| *index >= MAX_INDEX) || message.request_snapshot != 0 {
        return Err("an index is too high");
    }
    match kind {
        MessageType::MsgAppend => check_entries(message),
        MessageType::MsgPropose => check_proposals(&message.entries),
        MessageType::MsgReadIndex | MessageType::MsgReadIndexResp if message.entries.len() != 1 => {
            Err("it asks for no read")
        }
        _ => Ok(()),
    }
}

fn check_entries(message: &Message) -> Result<(), Refusal> {
    let mut before = (message.index, message.log_term);
    for entry in &message.entries {
        if entry.index != before.0 + 1 {
            return Err("its entries don't follow each other");
        }
        if entry.term < before.1 || entry.term > message.term || entry.term == 0 {
            return Err("its entries' terms go back, or ahead of its own");
        }
        if EntryType::from_i32(entry.entry_type).is_none() {
            return Err("an entry's kind is unknown");
        }
        before = (entry.index, entry.term);
    }
    if message.log_term > message.term {
        return Err("it follows an entry of a later term");
    }
    Ok(())
}

fn check_proposals(entries: &[Entry]) -> Result<(), Refusal> {
    if entries.is_empty() {
        return Err("it proposes nothing");
    }
    for entry in entries {
        let makes_sense = match EntryType::from_i32(entry.entry_type) {
            Some(EntryType::EntryNormal) => Command::decode(&entry.data[..]).is_ok(),
            Some(EntryType::EntryConfChange) => {
                let change: Result<ConfChange, _> = prost_of_raft::Message::decode(&entry.data[..]);
                change.is_ok_and(|change| {
                    ConfChangeType::from_i32(change.change_type).is_some()
                        && MembershipChange::decode(&change.context[..]).is_ok()
                })
            }
            _ => false,
        };
        if !makes_sense {
            return Err("what it proposes makes no sense");
        }
    }
    Ok(())
}

/// Refuses a term that no election can have led to, in the term `own`. Who sends it is to be cut off.
pub fn check_term(message: &Message, own: u64) -> Result<(), Refusal> {
    if message.term > own.saturating_add(MAX_TERM_AHEAD) {
        return Err("its term is not plausible");
    }
    Ok(())
}

/// Refuses what contradicts what this member knows. The form was checked.
pub fn check<T: Storage>(raft: &Raft<T>, message: &Message) -> Result<(), Refusal> {
    check_term(message, raft.term)?;
    let same_term = message.term == raft.term;
    let log = &raft.raft_log;
    match message.msg_type() {
        MessageType::MsgAppend | MessageType::MsgHeartbeat | MessageType::MsgSnapshot
            if same_term && !may_lead(raft, message.from) =>
        {
            Err("another member leads in its term")
        }
        MessageType::MsgAppend if message.term >= raft.term => {
            let behind = message.index >= log.committed
                && message.log_term < log.term(log.committed).unwrap_or(0);
            if behind {
                return Err("it contradicts what is committed");
            }
            Ok(())
        }
        MessageType::MsgHeartbeat
            if message.term >= raft.term && message.commit > log.last_index() =>
        {
            Err("it says that this member has entries which it does not have")
        }
        MessageType::MsgAppendResponse
            if same_term
                && (message.index > log.last_index() || message.reject_hint > message.index) =>
        {
            Err("it says that it has entries which nobody has")
        }
        MessageType::MsgTimeoutNow | MessageType::MsgReadIndexResp
            if message.from != raft.leader_id =>
        {
            Err("it is for the leader to say")
        }
        MessageType::MsgTransferLeader if raft.state != StateRole::Leader => {
            Err("this member does not lead")
        }
        MessageType::MsgPropose | MessageType::MsgReadIndex | MessageType::MsgTransferLeader
            if raft.prs().get(message.from).is_none() =>
        {
            Err("it is not of a member")
        }
        _ => Ok(()),
    }
}

fn may_lead<T: Storage>(raft: &Raft<T>, id: u64) -> bool {
    raft.state != StateRole::Leader && [raft::INVALID_ID, id].contains(&raft.leader_id)
}

/// Refuses a configuration that consensus could not have agreed on.
pub fn check_configuration(state: &ConfState) -> Result<(), Refusal> {
    let mut ids: Vec<u64> = state
        .voters
        .iter()
        .chain(&state.learners)
        .copied()
        .collect();
    let count = ids.len();
    ids.sort_unstable();
    ids.dedup();
    if state.voters.is_empty() || ids.len() != count || ids.contains(&raft::INVALID_ID) {
        return Err("its members make no sense");
    }
    if !state.voters_outgoing.is_empty() || !state.learners_next.is_empty() {
        return Err("its members are being changed all at once");
    }
    Ok(())
}
