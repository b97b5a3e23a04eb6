//! The same random users, roles, and requests of theirs to etcd and to keelson-state: the answers
//! are equal, refusals included. A seed repeats a run, as in `differential.rs`.

#![allow(clippy::unwrap_used)] // A test that can't go on panics.

use std::collections::HashMap;
use std::fmt::Debug;

use keelson_etcd_api::authpb::{Permission, UserAddOptions};
use keelson_etcd_api::etcdserverpb as pb;
use keelson_state_tests::{Agreement, Cluster, Program, Random, compare, number};
use pb::auth_client::AuthClient;
use pb::cluster_client::ClusterClient;
use pb::kv_client::KvClient;
use pb::lease_client::LeaseClient;
use pb::maintenance_client::MaintenanceClient;
use pb::request_op::Request as Op;
use pb::watch_client::WatchClient;
use pb::watch_request::RequestUnion;
use tonic::transport::Channel;
use tonic::{Request, Response, Status};

const USERS: [&str; 5] = ["root", "anne", "bob", "", "nobody"];
const ROLES: [&str; 5] = ["root", "reader", "writer", "", "none"];
/// Both hash passwords, as little as they can.
const FLAGS: [&str; 2] = ["--bcrypt-cost", "4"];

#[tokio::test]
async fn the_same_rights() {
    let seed = number("KEELSON_SEED", 1);
    let steps = number("KEELSON_STEPS", 3000);
    let etcd = Cluster::start(Program::Etcd, 1, &FLAGS).await;
    let keelson = Cluster::start(Program::KeelsonState, 1, &FLAGS).await;
    let mut run = Run {
        random: Random::new(seed),
        channels: [etcd.connect(0).await, keelson.connect(0).await],
        tokens: HashMap::new(),
        actor: None,
        context: String::new(),
        answers: 0,
        refusals: 0,
    };
    run.set_up().await;
    for step in 0..steps {
        run.actor = run.someone();
        run.context = format!("seed {seed}, step {step}, as {:?}", run.actor);
        run.one().await;
        if step % 500 == 499 {
            // Root may have lost its token, and what it may do.
            run.actor = Some("root".into());
            run.log_in("root", "root-password").await;
        }
    }
    assert!(
        run.answers > steps / 10 && run.refusals > steps / 10,
        "{} answers, {} refusals",
        run.answers,
        run.refusals
    );
}

/// Both calls with the tokens of who is acting.
macro_rules! both {
    ($run:ident, $client:ident, $method:ident, $request:expr) => {{
        let request = $request;
        let context = format!("{}: {request:?}", $run.context);
        let mut answers = Vec::new();
        for at in 0..2 {
            let mut client = $client::new($run.channels[at].clone());
            answers.push(client.$method($run.as_actor(at, request.clone())).await);
        }
        let keelson = answers.pop().unwrap();
        let etcd = answers.pop().unwrap();
        $run.agree(&context, etcd, keelson, |answer| vec![&mut answer.header])
    }};
}

struct Run {
    random: Random,
    /// etcd's and keelson-state's.
    channels: [Channel; 2],
    /// Tokens of users, as both gave them.
    tokens: HashMap<String, [String; 2]>,
    actor: Option<String>,
    context: String,
    answers: u64,
    refusals: u64,
}

impl Run {
    async fn set_up(&mut self) {
        let enable = pb::AuthEnableRequest {};
        both!(self, AuthClient, auth_enable, enable);
        for (user, password) in [("root", "root-password"), ("anne", "1"), ("bob", "2")] {
            let add = pb::AuthUserAddRequest {
                name: user.into(),
                password: password.into(),
                ..pb::AuthUserAddRequest::default()
            };
            both!(self, AuthClient, user_add, add);
        }
        both!(self, AuthClient, auth_enable, enable);
        for name in ["root", "reader", "writer"] {
            let add = pb::AuthRoleAddRequest { name: name.into() };
            both!(self, AuthClient, role_add, add);
        }
        let grant = pb::AuthUserGrantRoleRequest {
            user: "root".into(),
            role: "root".into(),
        };
        both!(self, AuthClient, user_grant_role, grant);
        let early = pb::AuthenticateRequest {
            name: "anne".into(),
            password: "1".into(),
        };
        both!(self, AuthClient, authenticate, early);
        assert_eq!(
            both!(self, AuthClient, auth_enable, enable),
            Agreement::Answered(1)
        );
        for (user, password) in [("root", "root-password"), ("anne", "1"), ("bob", "2")] {
            self.log_in(user, password).await;
        }
    }

    async fn log_in(&mut self, name: &str, password: &str) {
        let request = pb::AuthenticateRequest {
            name: name.into(),
            password: password.into(),
        };
        let mut tokens = Vec::new();
        for channel in &self.channels {
            let mut client = AuthClient::new(channel.clone());
            let answer = client.authenticate(request.clone()).await;
            tokens.push(answer.map(|answer| answer.into_inner().token));
        }
        let [etcd, keelson] = <[_; 2]>::try_from(tokens).unwrap();
        match (etcd, keelson) {
            (Ok(etcd), Ok(keelson)) => {
                self.tokens.insert(name.into(), [etcd, keelson]);
            }
            (Err(etcd), Err(keelson)) => assert_eq!(
                (etcd.code(), etcd.message()),
                (keelson.code(), keelson.message()),
                "{}: {request:?}",
                self.context
            ),
            other => panic!("{}: {request:?}: {other:?}", self.context),
        }
    }

    async fn one(&mut self) {
        match self.random.below(24) {
            0..=3 => {
                both!(self, KvClient, put, self.put());
            }
            4..=7 => {
                both!(self, KvClient, range, self.range());
            }
            8 | 9 => {
                both!(self, KvClient, delete_range, self.delete());
            }
            10..=12 => self.txn().await,
            13 => self.watch().await,
            14 => self.lease().await,
            15 => self.other().await,
            16..=18 => self.change_user().await,
            19..=21 => self.change_role().await,
            22 => {
                let name = self.random.pick(&USERS[..4]);
                let password = self.random.pick(&["1", "2", "", "root-password"]);
                self.log_in(name, password).await;
            }
            _ => self.ask().await,
        }
    }

    /// Most who act have logged in.
    fn someone(&mut self) -> Option<String> {
        match self.random.below(12) {
            0 => None,
            1 => Some("garbage".into()),
            2..=5 => Some("root".into()),
            6..=8 => Some("anne".into()),
            _ => Some("bob".into()),
        }
    }

    async fn txn(&mut self) {
        let operation = |request| pb::RequestOp {
            request: Some(request),
        };
        let mut operations = Vec::new();
        for _ in 0..self.random.below(4) {
            operations.push(operation(match self.random.below(3) {
                0 => Op::RequestPut(pb::PutRequest {
                    // etcd forgets in transactions that this reads.
                    prev_kv: false,
                    ..self.put()
                }),
                1 => Op::RequestRange(self.range()),
                _ => Op::RequestDeleteRange(pb::DeleteRangeRequest {
                    range_end: Vec::new().into(),
                    ..self.delete()
                }),
            }));
        }
        let range = self.range();
        let compare = pb::Compare {
            key: range.key,
            range_end: range.range_end,
            ..pb::Compare::default()
        };
        let request = pb::TxnRequest {
            compare: if self.random.one_in(2) {
                vec![compare]
            } else {
                Vec::new()
            },
            success: operations.clone(),
            failure: operations,
        };
        let context = format!("{}: {request:?}", self.context);
        let mut answers = Vec::new();
        for at in 0..2 {
            let mut client = KvClient::new(self.channels[at].clone());
            let answer = client.txn(self.as_actor(at, request.clone())).await;
            answers.push(answer.map(|answer| {
                // What is inside is compared elsewhere; here it is who may.
                let mut answer = answer.into_inner();
                answer.responses.clear();
                Response::new(answer)
            }));
        }
        let keelson = answers.pop().unwrap();
        let etcd = answers.pop().unwrap();
        self.agree(&context, etcd, keelson, |answer| vec![&mut answer.header]);
    }

    /// Creates a watch and compares the answer to that.
    async fn watch(&mut self) {
        let mut range = self.range();
        if range.range_end[..] == [0] {
            // Who may read one key may watch all keys after it in etcd 3.5.30: a hole.
            range.range_end = Vec::new().into();
        }
        let create = pb::WatchCreateRequest {
            key: range.key,
            range_end: range.range_end,
            ..pb::WatchCreateRequest::default()
        };
        let mut answers = Vec::new();
        for at in 0..2 {
            let request = pb::WatchRequest {
                request_union: Some(RequestUnion::CreateRequest(create.clone())),
            };
            let requests =
                futures::StreamExt::chain(tokio_stream::once(request), tokio_stream::pending());
            let mut client = WatchClient::new(self.channels[at].clone());
            let responses = client.watch(self.as_actor(at, requests)).await;
            let answer = responses.unwrap().into_inner().message().await;
            answers.push(answer.map(|answer| Response::new(answer.unwrap())));
        }
        let keelson = answers.pop().unwrap();
        let etcd = answers.pop().unwrap();
        let context = format!("{}: {create:?}", self.context);
        self.agree(&context, etcd, keelson, |answer| vec![&mut answer.header]);
    }

    async fn lease(&mut self) {
        let id = i64::try_from(1 + self.random.below(4)).unwrap();
        match self.random.below(3) {
            // Without a user, etcd grants leases to anybody.
            0 if self.actor.is_some() => {
                both!(
                    self,
                    LeaseClient,
                    lease_grant,
                    pb::LeaseGrantRequest { ttl: 1000, id }
                );
            }
            1 => {
                both!(
                    self,
                    LeaseClient,
                    lease_revoke,
                    pb::LeaseRevokeRequest { id }
                );
            }
            _ => {}
        }
    }

    /// Only who is never given root, or always has it: etcd decides these before its log, and was
    /// seen to be late.
    async fn other(&mut self) {
        if !matches!(self.actor.as_deref(), None | Some("root")) {
            return;
        }
        match self.random.below(3) {
            0 => {
                let request = pb::MemberRemoveRequest { id: 1 };
                both!(self, ClusterClient, member_remove, request);
            }
            // To others, etcd answers with an error that it forgot to translate.
            1 if self.actor.as_deref() == Some("root") => {
                both!(
                    self,
                    MaintenanceClient,
                    defragment,
                    pb::DefragmentRequest {}
                );
            }
            _ => {
                let request = pb::MemberUpdateRequest {
                    id: 1,
                    peer_ur_ls: vec!["http://127.0.0.9:1".into()],
                };
                both!(self, ClusterClient, member_update, request);
            }
        }
    }

    async fn change_user(&mut self) {
        let name = self.random.pick(&USERS).to_owned();
        let role = self.random.pick(&ROLES).to_owned();
        // Root keeps its password, so that the run goes on.
        let other = if name == "root" {
            "bob".to_owned()
        } else {
            name.clone()
        };
        match self.random.below(6) {
            0 => {
                let options = UserAddOptions {
                    // It never tries to log in: etcd forgot to translate what it says then.
                    no_password: name == "nobody" && self.random.one_in(2),
                };
                let request = pb::AuthUserAddRequest {
                    name,
                    password: self.random.pick(&["1", "2"]).into(),
                    options: self.random.one_in(2).then_some(options),
                    ..pb::AuthUserAddRequest::default()
                };
                both!(self, AuthClient, user_add, request);
            }
            1 if self.random.one_in(3) => {
                let request = pb::AuthUserDeleteRequest { name };
                both!(self, AuthClient, user_delete, request);
            }
            2 if self.random.one_in(3) => {
                let request = pb::AuthUserChangePasswordRequest {
                    name: other,
                    password: self.random.pick(&["1", "2"]).into(),
                    ..pb::AuthUserChangePasswordRequest::default()
                };
                both!(self, AuthClient, user_change_password, request);
            }
            3 | 4 => {
                let role = if role == "root" && self.random.one_in(3) {
                    "reader".into()
                } else {
                    role
                };
                let request = pb::AuthUserGrantRoleRequest { user: other, role };
                both!(self, AuthClient, user_grant_role, request);
            }
            _ => {
                let request = pb::AuthUserRevokeRoleRequest { name, role };
                both!(self, AuthClient, user_revoke_role, request);
            }
        }
    }

    async fn change_role(&mut self) {
        let name = self.random.pick(&ROLES).to_owned();
        let key = self.key();
        // One end for each key: etcd looks for a permission by its key alone.
        let range_end: Vec<u8> = match key.as_bytes().last() {
            Some(b'1') => b"k4".to_vec(),
            Some(b'2') => vec![0],
            Some(b'4') => b"k6".to_vec(),
            Some(b'7') => b"k3".to_vec(),
            _ => Vec::new(),
        };
        match self.random.below(6) {
            0 => {
                both!(self, AuthClient, role_add, pb::AuthRoleAddRequest { name });
            }
            1 if self.random.one_in(3) => {
                both!(
                    self,
                    AuthClient,
                    role_delete,
                    pb::AuthRoleDeleteRequest { role: name }
                );
            }
            2 => {
                let request = pb::AuthRoleRevokePermissionRequest {
                    role: name,
                    key: key.into(),
                    range_end: range_end.into(),
                };
                both!(self, AuthClient, role_revoke_permission, request);
            }
            _ => {
                let permission = Permission {
                    perm_type: i32::try_from(self.random.below(3)).unwrap(),
                    key: key.into(),
                    range_end: range_end.into(),
                };
                let request = pb::AuthRoleGrantPermissionRequest {
                    name,
                    perm: (!self.random.one_in(20)).then_some(permission),
                };
                both!(self, AuthClient, role_grant_permission, request);
            }
        }
    }

    async fn ask(&mut self) {
        match self.random.below(5) {
            0 => {
                both!(self, AuthClient, auth_status, pb::AuthStatusRequest {});
            }
            1 => {
                let name = self.random.pick(&USERS).to_owned();
                both!(self, AuthClient, user_get, pb::AuthUserGetRequest { name });
            }
            2 => {
                let role = self.random.pick(&ROLES).to_owned();
                both!(self, AuthClient, role_get, pb::AuthRoleGetRequest { role });
            }
            3 => {
                both!(self, AuthClient, user_list, pb::AuthUserListRequest {});
            }
            _ => {
                both!(self, AuthClient, role_list, pb::AuthRoleListRequest {});
            }
        }
    }

    /// A request with the token that this server gave to who acts.
    fn as_actor<T>(&self, server: usize, message: T) -> Request<T> {
        let mut request = Request::new(message);
        if let Some(actor) = &self.actor {
            let token = self
                .tokens
                .get(actor)
                .map_or("garbage", |tokens| &tokens[server]);
            request
                .metadata_mut()
                .insert("token", token.parse().unwrap());
        }
        request
    }

    fn agree<T: Debug + PartialEq>(
        &mut self,
        context: &str,
        etcd: Result<Response<T>, Status>,
        keelson: Result<Response<T>, Status>,
        headers: impl Fn(&mut T) -> Vec<&mut Option<pb::ResponseHeader>>,
    ) -> Agreement {
        let agreement = compare(context, etcd, keelson, headers);
        match agreement {
            Agreement::Answered(_) => self.answers += 1,
            Agreement::Refused => self.refusals += 1,
        }
        agreement
    }

    fn key(&mut self) -> String {
        format!("k{}", self.random.below(9))
    }

    fn put(&mut self) -> pb::PutRequest {
        pb::PutRequest {
            key: self.key().into(),
            value: "v".into(),
            lease: if self.random.one_in(4) {
                i64::try_from(1 + self.random.below(4)).unwrap()
            } else {
                0
            },
            prev_kv: self.random.one_in(3),
            ..pb::PutRequest::default()
        }
    }

    fn range(&mut self) -> pb::RangeRequest {
        let (key, end) = (self.key(), self.key());
        let range_end = match self.random.below(5) {
            // Who may read a range of nothing is an accident in etcd.
            2 | 3 if end > key => end.into_bytes(),
            4 => vec![0],
            _ => Vec::new(),
        };
        pb::RangeRequest {
            key: key.into(),
            range_end: range_end.into(),
            serializable: self.random.one_in(3),
            ..pb::RangeRequest::default()
        }
    }

    fn delete(&mut self) -> pb::DeleteRangeRequest {
        let range = self.range();
        pb::DeleteRangeRequest {
            key: range.key,
            range_end: range.range_end,
            prev_kv: self.random.one_in(3),
        }
    }
}
