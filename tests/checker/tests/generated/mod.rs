//! Histories that a correct store may show, from a seed: requests are applied to the reference one
//! after the other, and each is given a call before and an end after.

use keelson_checker::*;

/// A correct history, and its random numbers to go on with.
pub struct Generated {
    pub history: History,
    pub random: Random,
}

/// Random numbers that a seed repeats (splitmix64).
pub struct Random(pub u64);

impl Random {
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.number() % limit
    }

    pub fn one_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }
}

/// Generates a history of so many operations.
pub fn generate(seed: u64, count: usize) -> Generated {
    let mut store = Store {
        random: Random(seed),
        now: 1000,
        models: vec![Model::new(&Initial::default())],
        events: Vec::new(),
        operations: Vec::new(),
        values: 0,
        leases: 0,
    };
    for _ in 0..count {
        store.now += 10;
        store.operation();
    }
    let watches = (0..4).map(|client| store.watch(1000 + client)).collect();
    Generated {
        history: History {
            operations: store.operations,
            watches,
            ..History::default()
        },
        random: store.random,
    }
}

struct Store {
    random: Random,
    now: u64,
    /// Every state that there was.
    models: Vec<Model>,
    /// What changed, by revision, and when.
    events: Vec<(u64, Vec<Event>)>,
    operations: Vec<Operation>,
    values: u64,
    leases: i64,
}

impl Store {
    fn operation(&mut self) {
        if self.leases > 0 && self.random.one_in(30) {
            // A lease ends by itself.
            let lease = self.lease();
            let _ = self.apply(&Request::LeaseRevoke(lease));
        }
        let request = self.request();
        let outcome = match self.random.below(20) {
            0 => Outcome::Failed,
            1 => Outcome::Unknown,
            2 => {
                let _ = self.apply(&request);
                Outcome::Unknown
            }
            _ => match self.apply(&request) {
                Ok(response) => Outcome::Ok(response),
                Err(refusal) => Outcome::Refused(refusal),
            },
        };
        let operation = Operation {
            client: self.operations.len() as u64,
            call: self.now - self.random.below(60),
            end: self.now + self.random.below(60),
            request,
            outcome,
        };
        self.operations.push(operation);
    }

    fn apply(&mut self, request: &Request) -> Result<Response, Refusal> {
        let model = self.models.last().unwrap().clone();
        if let Request::Range(range) = request {
            return self.range(&model, range);
        }
        let step = model.apply(request)?;
        if !step.events.is_empty() {
            self.events.push((self.now, step.events));
        }
        self.models.push(step.model);
        Ok(step.response)
    }

    fn range(&mut self, now: &Model, range: &Range) -> Result<Response, Refusal> {
        let read = if range.revision > 0 {
            now.apply(&Request::Range(range.clone()))?;
            let mut models = self.models.iter();
            models
                .find(|model| model.revision() == range.revision)
                .unwrap()
        } else {
            now
        };
        let mut header = now.revision();
        let mut result = read.read(range);
        if range.serializable {
            let back = self.random.below(5) as usize;
            let stale = &self.models[self.models.len().saturating_sub(1 + back)];
            header = stale.revision();
            result = stale.read(range);
        }
        Ok(Response::Range {
            revision: header,
            result,
        })
    }

    fn request(&mut self) -> Request {
        let revision = self.models.last().unwrap().revision();
        match self.random.below(16) {
            0..5 => Request::Put(self.put()),
            5..8 => Request::Range(Range {
                limit: self.random.below(3) as usize,
                ..Range::of(self.keys())
            }),
            8 => Request::Range(Range {
                serializable: true,
                ..Range::of(self.keys())
            }),
            9 => Request::Range(Range {
                revision: 1 + self.random.below(revision as u64 + 1) as i64,
                ..Range::of(self.keys())
            }),
            10 => Request::Delete(self.delete()),
            11 | 12 => Request::Txn(self.txn()),
            13 if self.random.one_in(4) => {
                Request::Compact(1 + self.random.below(revision as u64 + 1) as i64)
            }
            13 => Request::LeaseRevoke(self.lease()),
            _ => {
                self.leases += 1;
                Request::LeaseGrant(self.leases)
            }
        }
    }

    fn put(&mut self) -> Put {
        self.values += 1;
        Put {
            key: self.key(),
            value: self.values.to_string().into(),
            lease: if self.leases > 0 && self.random.one_in(3) {
                self.lease()
            } else {
                0
            },
            prev_kv: self.random.one_in(2),
        }
    }

    fn delete(&mut self) -> Delete {
        Delete {
            keys: self.keys(),
            prev_kv: self.random.one_in(2),
        }
    }

    fn txn(&mut self) -> Txn {
        let key = self.key();
        let found = self
            .models
            .last()
            .unwrap()
            .get(&key)
            .map_or(0, |kv| kv.mod_revision);
        let other = Keys::One(self.key());
        Txn {
            compares: vec![Compare {
                keys: Keys::One(key),
                relation: Relation::Equal,
                target: Target::ModRevision(found + i64::from(self.random.one_in(3))),
            }],
            success: vec![
                TxnOperation::Put(Put {
                    lease: 0,
                    ..self.put()
                }),
                TxnOperation::Range(Range::of(Keys::all())),
            ],
            failure: vec![
                TxnOperation::Delete(Delete {
                    keys: other,
                    prev_kv: true,
                }),
                TxnOperation::Range(Range::of(self.keys())),
            ],
        }
    }

    fn key(&mut self) -> bytes::Bytes {
        format!("k{}", self.random.below(6)).into()
    }

    fn keys(&mut self) -> Keys {
        match self.random.below(4) {
            0 => Keys::all(),
            1 => Keys::Range("k1".into(), "k4".into()),
            _ => Keys::One(self.key()),
        }
    }

    fn lease(&mut self) -> i64 {
        1 + self.random.below(self.leases.unsigned_abs() + 1) as i64
    }

    /// A watch that gets all it should, in messages of random size, with progress now and then.
    fn watch(&mut self, client: u64) -> Watch {
        let last = self.models.last().unwrap().revision();
        let start = 2 + self.random.below(last.unsigned_abs()) as i64 / 2;
        let request = WatchRequest {
            keys: if client == 1000 {
                Keys::all()
            } else {
                self.keys()
            },
            no_put: client != 1000 && self.random.one_in(6),
            no_delete: client != 1000 && self.random.one_in(6),
            prev_kv: self.random.one_in(2),
            start_revision: if client == 1000 { 2 } else { start },
        };
        let mut watch = Watch {
            client,
            call: 0,
            request,
            responses: vec![WatchResponse {
                at: 0,
                revision: 1,
                body: WatchBody::Created,
            }],
            complete_through: Some(last),
        };
        let mut waiting = Vec::new();
        for (at, events) in self.events.clone() {
            let revision = events[0].revision();
            if revision < watch.request.start_revision {
                continue;
            }
            let wanted = events
                .into_iter()
                .filter(|event| watch.request.wants(event));
            waiting.extend(wanted.map(|mut event| {
                event.prev_kv = event.prev_kv.filter(|_| watch.request.prev_kv);
                event
            }));
            if self.random.one_in(2) {
                send(
                    &mut watch,
                    at,
                    revision,
                    &mut waiting,
                    self.random.one_in(3),
                );
            }
        }
        send(&mut watch, self.now + 100, last, &mut waiting, true);
        watch
    }
}

fn send(watch: &mut Watch, at: u64, revision: i64, events: &mut Vec<Event>, progress: bool) {
    let mut push = |body| watch.responses.push(WatchResponse { at, revision, body });
    if !events.is_empty() {
        push(WatchBody::Events(std::mem::take(events)));
    }
    if progress {
        push(WatchBody::Progress);
    }
}
