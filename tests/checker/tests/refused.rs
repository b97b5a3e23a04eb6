//! For each rule, a history that breaks it, and beside it one that just keeps it.

#![allow(clippy::unwrap_used, missing_docs)]

use keelson_checker::*;

fn put(
    client: u64,
    call: u64,
    end: u64,
    key: &'static str,
    value: &'static str,
    revision: i64,
) -> Operation {
    operation(
        client,
        call,
        end,
        put_of(key, value, 0),
        Outcome::Ok(Response::Put {
            revision,
            prev_kv: None,
        }),
    )
}

fn put_of(key: &'static str, value: &'static str, lease: i64) -> Request {
    Request::Put(Put {
        key: key.into(),
        value: value.into(),
        lease,
        prev_kv: false,
    })
}

fn read(client: u64, call: u64, end: u64, revision: i64, found: &[KeyValue]) -> Operation {
    read_with(
        client,
        call,
        end,
        revision,
        found,
        Range::of(Keys::One("k".into())),
    )
}

fn read_with(
    client: u64,
    call: u64,
    end: u64,
    revision: i64,
    found: &[KeyValue],
    range: Range,
) -> Operation {
    let result = RangeResult {
        kvs: found.to_vec(),
        count: found.len(),
        more: false,
    };
    operation(
        client,
        call,
        end,
        Request::Range(range),
        Outcome::Ok(Response::Range { revision, result }),
    )
}

fn operation(client: u64, call: u64, end: u64, request: Request, outcome: Outcome) -> Operation {
    Operation {
        client,
        call,
        end,
        request,
        outcome,
    }
}

fn kv(
    key: &'static str,
    value: &'static str,
    create_revision: i64,
    mod_revision: i64,
    version: i64,
) -> KeyValue {
    KeyValue {
        key: key.into(),
        value: value.into(),
        create_revision,
        mod_revision,
        version,
        lease: 0,
    }
}

fn of(operations: Vec<Operation>) -> History {
    History {
        operations,
        ..History::default()
    }
}

#[track_caller]
fn holds(history: &History) {
    let report = check(history, &Limits::default());
    assert!(report.holds(), "{report}");
}

#[track_caller]
fn breaks(history: &History, rule: &str) -> String {
    let report = check(history, &Limits::default());
    assert!(
        report.broken().any(|(broken, _)| broken == rule),
        "{rule} should be broken\n{report}"
    );
    report.to_string()
}

#[test]
fn a_read_after_a_write_sees_it() {
    let seen = [kv("k", "a", 2, 2, 1)];
    holds(&of(vec![
        put(0, 1, 2, "k", "a", 2),
        read(1, 3, 4, 2, &seen),
    ]));
    // While the write is on its way, both are right.
    holds(&of(vec![put(0, 1, 5, "k", "a", 2), read(1, 3, 4, 1, &[])]));
    let said = breaks(
        &of(vec![put(0, 1, 2, "k", "a", 2), read(1, 3, 4, 1, &[])]),
        "linearizability",
    );
    assert!(said.contains("range k -> 0 keys (revision 1)"), "{said}");
}

#[test]
fn reads_do_not_go_back_in_time() {
    let seen = [kv("k", "a", 2, 2, 1)];
    let write = put(0, 1, 100, "k", "a", 2);
    holds(&of(vec![
        write.clone(),
        read(1, 3, 4, 1, &[]),
        read(2, 5, 6, 2, &seen),
    ]));
    breaks(
        &of(vec![write, read(1, 3, 4, 2, &seen), read(2, 5, 6, 1, &[])]),
        "linearizability",
    );
}

#[test]
fn a_serializable_read_may_be_old_but_not_made_up() {
    let serializable = Range {
        serializable: true,
        ..Range::of(Keys::One("k".into()))
    };
    let write = put(0, 1, 2, "k", "a", 2);
    holds(&of(vec![
        write.clone(),
        read_with(1, 3, 4, 1, &[], serializable.clone()),
    ]));
    let made_up = [kv("k", "b", 2, 2, 1)];
    breaks(
        &of(vec![
            write.clone(),
            read_with(1, 3, 4, 2, &made_up, serializable.clone()),
        ]),
        "linearizability",
    );
    // Nor may it be of a state that is still to come.
    let later = put(0, 5, 6, "k", "b", 3);
    let seen = [kv("k", "b", 2, 3, 2)];
    breaks(
        &of(vec![
            write,
            read_with(1, 3, 4, 3, &seen, serializable),
            later,
        ]),
        "linearizability",
    );
}

#[test]
fn a_write_of_unknown_outcome_happens_once_or_never() {
    let unknown = operation(0, 1, 2, put_of("k", "a", 0), Outcome::Unknown);
    let seen = [kv("k", "a", 2, 2, 1)];
    holds(&of(vec![unknown.clone(), read(1, 3, 4, 1, &[])]));
    holds(&of(vec![
        unknown.clone(),
        read(1, 3, 4, 1, &[]),
        read(1, 5, 6, 2, &seen),
    ]));
    let twice = [kv("k", "a", 2, 3, 2)];
    breaks(
        &of(vec![unknown.clone(), read(1, 3, 4, 3, &twice)]),
        "linearizability",
    );
    // What failed for certain did not happen.
    let failed = Operation {
        outcome: Outcome::Failed,
        ..unknown
    };
    breaks(
        &of(vec![failed, read(1, 3, 4, 2, &seen)]),
        "linearizability",
    );
}

#[test]
fn a_revision_is_made_once() {
    breaks(
        &of(vec![put(0, 1, 9, "k", "a", 2), put(1, 1, 9, "k", "b", 2)]),
        "linearizability",
    );
    // And none is left out.
    breaks(
        &of(vec![put(0, 1, 2, "k", "a", 2), put(0, 3, 4, "k", "b", 4)]),
        "linearizability",
    );
}

#[test]
fn of_two_that_compare_the_same_one_succeeds() {
    let swap = |client, value: &'static str, revision, succeeded| {
        let request = Request::Txn(Txn {
            compares: vec![Compare {
                keys: Keys::One("k".into()),
                relation: Relation::Equal,
                target: Target::ModRevision(0),
            }],
            success: vec![TxnOperation::Put(Put {
                key: "k".into(),
                value: value.into(),
                lease: 0,
                prev_kv: false,
            })],
            failure: vec![],
        });
        let results = if succeeded {
            vec![TxnResult::Put { prev_kv: None }]
        } else {
            vec![]
        };
        operation(
            client,
            1,
            9,
            request,
            Outcome::Ok(Response::Txn {
                revision,
                succeeded,
                results,
            }),
        )
    };
    holds(&of(vec![swap(0, "a", 2, true), swap(1, "b", 2, false)]));
    breaks(
        &of(vec![swap(0, "a", 2, true), swap(1, "b", 3, true)]),
        "linearizability",
    );
}

#[test]
fn compacted_history_is_not_read() {
    let past = Range {
        revision: 2,
        ..Range::of(Keys::One("k".into()))
    };
    let history = |compacted: bool| {
        let asked = Request::Range(past.clone());
        let read = if compacted {
            operation(0, 7, 8, asked, Outcome::Refused(Refusal::Compacted))
        } else {
            read_with(0, 7, 8, 3, &[kv("k", "a", 2, 2, 1)], past.clone())
        };
        of(vec![
            put(0, 1, 2, "k", "a", 2),
            put(0, 3, 4, "k", "b", 3),
            operation(0, 5, 6, Request::Compact(3), Outcome::Ok(Response::Done)),
            read,
        ])
    };
    holds(&history(true));
    breaks(&history(false), "linearizability");
    // Nor is it refused where nothing was compacted.
    let mut history = history(true);
    history.operations.remove(2);
    breaks(&history, "linearizability");
}

#[test]
fn what_was_read_of_the_past_is_what_was_there() {
    let past = Range {
        revision: 2,
        ..Range::of(Keys::One("k".into()))
    };
    let writes = vec![put(0, 1, 2, "k", "a", 2), put(0, 3, 4, "k", "b", 3)];
    let mut right = writes.clone();
    right.push(read_with(
        0,
        7,
        8,
        3,
        &[kv("k", "a", 2, 2, 1)],
        past.clone(),
    ));
    holds(&of(right));
    let mut wrong = writes;
    wrong.push(read_with(0, 7, 8, 3, &[kv("k", "b", 2, 3, 2)], past));
    breaks(&of(wrong), "linearizability");
}

#[test]
fn keys_go_with_their_lease_and_not_otherwise() {
    let grant = operation(0, 1, 2, Request::LeaseGrant(7), Outcome::Ok(Response::Done));
    let attach = |lease| {
        let outcome = Outcome::Ok(Response::Put {
            revision: 2,
            prev_kv: None,
        });
        operation(0, 3, 4, put_of("k", "a", lease), outcome)
    };
    let gone = read(0, 9, 10, 3, &[]);
    // It ends by itself, or is revoked.
    holds(&of(vec![grant.clone(), attach(7), gone.clone()]));
    let revoke = operation(
        0,
        5,
        6,
        Request::LeaseRevoke(7),
        Outcome::Ok(Response::Done),
    );
    holds(&of(vec![grant.clone(), attach(7), revoke, gone.clone()]));
    breaks(&of(vec![grant, attach(0), gone]), "linearizability");
    let unleased = operation(
        0,
        3,
        4,
        put_of("k", "a", 8),
        Outcome::Refused(Refusal::LeaseNotFound),
    );
    holds(&of(vec![unleased]));
    breaks(&of(vec![attach(7)]), "linearizability");
}

/// A watch of everything, with these messages.
fn watched(messages: Vec<Vec<Event>>) -> History {
    let mut history = of(vec![
        put(0, 1, 2, "k", "a", 2),
        put(0, 3, 4, "l", "b", 3),
        put(0, 5, 6, "k", "c", 4),
    ]);
    let mut responses = vec![WatchResponse {
        at: 0,
        revision: 1,
        body: WatchBody::Created,
    }];
    for (at, events) in (11..).zip(messages) {
        let body = if events.is_empty() {
            WatchBody::Progress
        } else {
            WatchBody::Events(events)
        };
        responses.push(WatchResponse {
            at,
            revision: 4,
            body,
        });
    }
    history.watches.push(Watch {
        client: 9,
        call: 0,
        request: WatchRequest::of(Keys::all(), 2),
        responses,
        complete_through: None,
    });
    history
}

fn event(kv: KeyValue, prev_kv: Option<KeyValue>) -> Event {
    Event {
        kind: EventKind::Put,
        kv,
        prev_kv,
    }
}

fn events() -> [Event; 3] {
    [
        event(kv("k", "a", 2, 2, 1), None),
        event(kv("l", "b", 3, 3, 1), None),
        event(kv("k", "c", 2, 4, 2), Some(kv("k", "a", 2, 2, 1))),
    ]
}

#[test]
fn watches_keep_each_guarantee() {
    let [a, b, c] = events();
    holds(&watched(vec![
        vec![a.clone(), b.clone()],
        vec![c.clone()],
        vec![],
    ]));
    breaks(
        &watched(vec![vec![a.clone()], vec![c.clone()], vec![b.clone()]]),
        "watch: ordered",
    );
    breaks(
        &watched(vec![vec![a.clone(), b.clone()], vec![b.clone(), c.clone()]]),
        "watch: unique",
    );
    breaks(
        &watched(vec![vec![a.clone()], vec![c.clone()]]),
        "watch: reliable",
    );
    breaks(
        &watched(vec![vec![b.clone(), c.clone()]]),
        "watch: resumable",
    );
    breaks(
        &watched(vec![vec![a.clone(), b.clone()], vec![], vec![c.clone()]]),
        "watch: bookmarkable",
    );
    breaks(
        &watched(vec![vec![a.clone(), b.clone()], vec![]]),
        "watch: bookmarkable",
    );
    let without = Event {
        prev_kv: None,
        ..c.clone()
    };
    breaks(
        &watched(vec![vec![a.clone(), b.clone(), without]]),
        "watch: prev-kv",
    );
    let created = event(kv("k", "c", 4, 4, 1), c.prev_kv.clone());
    breaks(
        &watched(vec![vec![a.clone(), b.clone(), created]]),
        "watch: is-create",
    );
    let mut filtered = watched(vec![vec![a.clone(), b.clone()]]);
    filtered.watches[0].request.no_put = true;
    breaks(&filtered, "watch: filter");
    let mut cut_short = watched(vec![vec![a, b]]);
    holds(&cut_short);
    cut_short.watches[0].complete_through = Some(4);
    breaks(&cut_short, "watch: reliable");
}

/// Which of two requests of unknown outcome made a revision, only a previous value tells.
#[test]
fn a_previous_value_says_what_happened() {
    let delete = operation(
        2,
        7,
        8,
        Request::Delete(Delete {
            keys: Keys::One("k".into()),
            prev_kv: false,
        }),
        Outcome::Ok(Response::Delete {
            revision: 4,
            deleted: 1,
            prev_kvs: Vec::new(),
        }),
    );
    let mut history = of(vec![
        put(0, 1, 2, "k", "a", 2),
        operation(0, 3, 4, put_of("l", "x", 0), Outcome::Unknown),
        operation(1, 5, 6, put_of("k", "b", 0), Outcome::Unknown),
        delete,
    ]);
    let told = |previous| WatchResponse {
        at: 9,
        revision: 4,
        body: WatchBody::Events(vec![Event::deleted(4, previous)]),
    };
    history.watches.push(Watch {
        client: 9,
        call: 8,
        request: WatchRequest::of(Keys::all(), 4),
        responses: vec![told(kv("k", "b", 2, 3, 2))],
        complete_through: None,
    });
    holds(&history);
    history.watches[0].responses = vec![told(kv("k", "a", 2, 2, 1))];
    holds(&history);
    history.watches[0].responses = vec![told(kv("k", "c", 2, 3, 2))];
    breaks(&history, "watch: prev-kv");
}

#[test]
fn one_revision_comes_in_one_message() {
    let keys = [kv("k", "a", 2, 2, 1), kv("l", "a", 2, 2, 1)];
    let puts = ["k", "l"].map(|key| {
        TxnOperation::Put(Put {
            key: key.into(),
            value: "a".into(),
            lease: 0,
            prev_kv: false,
        })
    });
    let results = vec![
        TxnResult::Put { prev_kv: None },
        TxnResult::Put { prev_kv: None },
    ];
    let txn = Request::Txn(Txn {
        compares: vec![],
        success: puts.into(),
        failure: vec![],
    });
    let outcome = Outcome::Ok(Response::Txn {
        revision: 2,
        succeeded: true,
        results,
    });
    let [k, l] = keys.map(|kv| event(kv, None));
    let mut whole = watched(vec![vec![k.clone(), l.clone()]]);
    whole.operations = vec![operation(0, 1, 2, txn, outcome)];
    holds(&whole);
    let mut torn = watched(vec![vec![k], vec![l]]);
    torn.operations = whole.operations;
    breaks(&torn, "watch: atomic");
}

/// Who was told of a revision must not be answered with an older state afterwards.
#[test]
fn reads_are_not_behind_watches() {
    let [a, ..] = events();
    let mut history = watched(vec![vec![a]]);
    history.operations = vec![put(0, 1, 100, "k", "a", 2), read(1, 5, 50, 1, &[])];
    holds(&history);
    history.operations[1] = read(1, 20, 50, 1, &[]);
    breaks(&history, "linearizability");
}

#[test]
fn leases_live_for_their_time() {
    let life = |gone, alive| History {
        leases: vec![LeaseTimes {
            id: 7,
            keep_alives: vec![
                KeepAlive {
                    call: 10,
                    end: 12,
                    promised: Some(100),
                    asked: 100,
                },
                KeepAlive {
                    call: 50,
                    end: 60,
                    promised: Some(100),
                    asked: 100,
                },
                KeepAlive {
                    call: 90,
                    end: 95,
                    promised: None,
                    asked: 100,
                },
            ],
            revoked: None,
            gone,
            alive,
            allowance: 20,
        }],
        ..History::default()
    };
    holds(&life(Some(150), Some(140)));
    breaks(&life(Some(149), None), "no lease ends early");
    // The last keep-alive may have been done.
    holds(&life(None, Some(215)));
    breaks(&life(None, Some(216)), "every lease ends");
    let mut revoked = life(Some(70), None);
    revoked.leases[0].revoked = Some(65);
    holds(&revoked);
}

/// Too little to decide with is no pass.
#[test]
fn undecided_does_not_hold() {
    let operations = (0..50).map(|at| put(at, 1, 1000, "k", "a", 2 + at.cast_signed()));
    let history = of(operations.collect());
    holds(&history);
    let report = check(
        &history,
        &Limits {
            steps: 10,
            states: 1000,
        },
    );
    assert!(
        !report.holds() && report.broken().next().is_none(),
        "{report}"
    );
    assert!(
        matches!(report.verdicts[0].1, Verdict::Undecided(_)),
        "{report}"
    );
}
