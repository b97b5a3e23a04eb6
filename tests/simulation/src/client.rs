//! Clients that read and write, one request at a time.

use bytes::Bytes;
use keelson_checker::{
    Compare, Delete, Keys, Operation, Outcome, Put, Range, Relation, Request, Target, Txn,
    TxnOperation,
};

use crate::random::Random;
use crate::server::{Arrival, Call, Reply};
use crate::settings::MILLISECOND;
use crate::world::{Caller, Happening, World};

/// Keys that clients fight over.
const KEYS: u64 = 8;

/// A client.
#[derive(Debug)]
pub(crate) struct Client {
    /// Its number in the history: a new one after each request of which it did not hear.
    number: u64,
    machine: usize,
    waiting: Option<Waiting>,
    requests: u64,
    /// The newest revision that it saw.
    seen: i64,
}

/// A request that is not answered yet.
#[derive(Debug)]
pub(crate) struct Waiting {
    number: u64,
    call: u64,
    request: Request,
}

impl World {
    pub(crate) fn new_client_number(&mut self) -> u64 {
        self.next_client += 1;
        self.next_client
    }

    pub(crate) fn add_client(&mut self) {
        let number = self.new_client_number();
        let machine = self.any_machine();
        self.clients.push(Client {
            number,
            machine,
            waiting: None,
            requests: 0,
            seen: 1,
        });
        let first = self.random.between(1, 1500) * MILLISECOND;
        self.plan(first, Happening::Client(self.clients.len() - 1));
    }

    /// A machine that is to run a member, if there is one.
    pub(crate) fn any_machine(&mut self) -> usize {
        let running: Vec<usize> = (0..self.machines.len())
            .filter(|number| self.machines[*number].member != 0)
            .collect();
        if running.is_empty() {
            return 0;
        }
        *self.random.pick(&running)
    }

    /// A client asks for its next thing.
    pub(crate) fn step_client(&mut self, index: usize) {
        if self.clients[index].waiting.is_some() {
            return;
        }
        if self.healed {
            if index == 0 && !self.probed {
                self.probe(index);
            }
            return;
        }
        if self.random.percent(5) || self.machines[self.clients[index].machine].member == 0 {
            self.clients[index].machine = self.any_machine();
        }
        let compactions = self.settings.compactions;
        let client = &mut self.clients[index];
        let value = format!("{}-{}", client.number, client.requests);
        let request = draw(&mut self.random, client.seen, value.into(), compactions);
        self.ask(index, request);
    }

    /// Sends a client's request.
    pub(crate) fn ask(&mut self, index: usize, request: Request) {
        let now = self.now;
        let client = &mut self.clients[index];
        client.requests += 1;
        let number = client.requests;
        let machine = client.machine;
        let who = client.number;
        client.waiting = Some(Waiting {
            number,
            call: now,
            request: request.clone(),
        });
        self.note(format_args!("client {who} → m{machine}: {request:?}"));
        let caller = Caller::Client(index, number);
        let arrival = Arrival {
            call: Call::Kv(request, 0),
            from: None,
        };
        let delay = self.network.latency();
        self.plan(
            delay,
            Happening::Request(machine, caller, Box::new(arrival)),
        );
        let patience = self.random.between(500, 9000) * MILLISECOND;
        self.plan(patience, Happening::GiveUp(caller));
    }

    /// Something came back for a client.
    pub(crate) fn client_heard(&mut self, index: usize, number: u64, reply: Reply) {
        let now = self.now;
        let client = &mut self.clients[index];
        if client
            .waiting
            .as_ref()
            .is_none_or(|waiting| waiting.number != number)
        {
            return;
        }
        let Some(waiting) = client.waiting.take() else {
            return;
        };
        let outcome = match reply {
            Reply::Kv(outcome) => outcome,
            Reply::Refused => Outcome::Failed,
            _ => Outcome::Unknown,
        };
        if let Outcome::Ok(response) = &outcome
            && let Some(revision) = response.revision()
        {
            client.seen = client.seen.max(revision);
        }
        let who = client.number;
        let answered = matches!(outcome, Outcome::Ok(_) | Outcome::Refused(_));
        self.note(format_args!("client {who} ← {outcome:?}"));
        self.history.operations.push(Operation {
            client: who,
            call: waiting.call,
            end: now,
            request: waiting.request,
            outcome: outcome.clone(),
        });
        if outcome == Outcome::Unknown {
            self.clients[index].number = self.new_client_number();
        }
        let think = if answered {
            self.random.below(self.settings.think)
        } else {
            self.clients[index].machine = self.any_machine();
            self.random.between(10, 300) * MILLISECOND
        };
        self.plan(think, Happening::Client(index));
        if self.healed {
            self.probe_heard(index, &outcome);
        }
    }

    /// A client that has nothing else to do asks whether the cluster is there again.
    pub(crate) fn probe(&mut self, index: usize) {
        self.clients[index].machine = self.any_machine();
        let value = format!("probe-{}", self.clients[index].requests);
        self.ask(index, put_of("probe".into(), value.into()));
    }

    /// Whether no client waits.
    pub(crate) fn clients_are_idle(&self) -> bool {
        self.clients.iter().all(|client| client.waiting.is_none())
    }
}

fn key(random: &mut Random) -> Bytes {
    format!("k{}", random.below(KEYS)).into()
}

fn keys(random: &mut Random) -> Keys {
    match random.below(10) {
        0 => Keys::prefix(b"k"),
        1 => Keys::Range(key(random), "k9".into()),
        2 => Keys::all(),
        _ => Keys::One(key(random)),
    }
}

fn put_of(key: Bytes, value: Bytes) -> Request {
    Request::Put(Put {
        key,
        value,
        lease: 0,
        prev_kv: false,
    })
}

fn range_of(random: &mut Random, keys: Keys, seen: i64) -> Range {
    let mut range = Range::of(keys);
    range.limit = if random.percent(20) {
        random.index(3) + 1
    } else {
        0
    };
    range.count_only = random.percent(5);
    range.keys_only = random.percent(5);
    if random.percent(10) {
        let back = i64::try_from(random.below(20)).unwrap_or(0);
        range.revision = (seen - back).max(1);
    }
    range
}

/// The next request of a client that has seen a revision.
fn draw(random: &mut Random, seen: i64, value: Bytes, compactions: u64) -> Request {
    let put = |random: &mut Random, value: Bytes| Put {
        key: key(random),
        value: pad(random, value),
        lease: 0,
        prev_kv: random.percent(30),
    };
    if random.percent(compactions) {
        let back = i64::try_from(random.below(30)).unwrap_or(0);
        return Request::Compact((seen - back).max(1));
    }
    match random.below(100) {
        0..35 => Request::Put(put(random, value)),
        35..55 => {
            let keys = keys(random);
            Request::Range(range_of(random, keys, seen))
        }
        55..63 => {
            let keys = keys(random);
            let mut range = range_of(random, keys, seen);
            range.serializable = true;
            Request::Range(range)
        }
        63..72 => Request::Delete(Delete {
            keys: if random.percent(85) {
                Keys::One(key(random))
            } else {
                Keys::Range("k0".into(), key(random))
            },
            prev_kv: random.percent(30),
        }),
        _ => {
            let compared = key(random);
            let target = match random.below(4) {
                0 => Target::ModRevision(seen - i64::try_from(random.below(4)).unwrap_or(0)),
                1 => Target::Version(i64::try_from(random.below(3)).unwrap_or(0)),
                2 => Target::CreateRevision(0),
                _ => Target::Value(value.clone()),
            };
            let relation = *random.pick(&[Relation::Equal, Relation::NotEqual, Relation::Less]);
            let mut success = vec![TxnOperation::Put(put(random, value))];
            let other = Keys::One(key(random));
            success.push(TxnOperation::Range(Range::of(other)));
            let failure = vec![TxnOperation::Range(Range::of(Keys::One(compared.clone())))];
            Request::Txn(Txn {
                compares: vec![Compare {
                    keys: Keys::One(compared),
                    relation,
                    target,
                }],
                success,
                failure,
            })
        }
    }
}

/// Some values are large.
fn pad(random: &mut Random, value: Bytes) -> Bytes {
    if !random.percent(10) {
        return value;
    }
    let mut padded = value.to_vec();
    padded.resize(padded.len() + random.index(6000), b'.');
    padded.into()
}
