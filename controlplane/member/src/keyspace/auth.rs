//! Users, roles and permissions, as etcd has them (`server/auth/store.go` of 3.5).

use bytes::Bytes;
use keelson_etcd_api::authpb::permission::Type;
use keelson_etcd_api::authpb::{Permission, Role, User};
use keelson_etcd_api::etcdserverpb as pb;
use prost::Message;

use super::range::{KeyRange, RangeEnd};
use crate::RequestError;
use crate::command::Authority;

const ROOT: &str = "root";

/// Users and roles, and whether they are asked for.
#[derive(Clone, PartialEq, Message)]
pub struct Auth {
    /// Whether requests need a user.
    #[prost(bool, tag = "1")]
    pub enabled: bool,
    /// Raised by every change.
    #[prost(uint64, tag = "2")]
    pub revision: u64,
    /// In order of their names.
    #[prost(message, repeated, tag = "3")]
    pub users: Vec<UserRecord>,
    /// In order of their names.
    #[prost(message, repeated, tag = "4")]
    pub roles: Vec<Role>,
    /// What tokens are signed with.
    #[prost(bytes = "bytes", tag = "5")]
    pub secret: Bytes,
}

/// A user.
#[derive(Clone, PartialEq, Message)]
pub struct UserRecord {
    /// Name, hash of the password, roles.
    #[prost(message, optional, tag = "1")]
    pub user: Option<User>,
    /// Tokens of an older revision are void.
    #[prost(uint64, tag = "2")]
    pub tokens_from: u64,
}

/// What is done with keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// They are read.
    Read,
    /// They are written.
    Write,
}

impl Auth {
    /// Nobody yet.
    pub fn new() -> Self {
        Self {
            revision: 1,
            ..Self::default()
        }
    }

    /// A user, if there is one.
    pub fn user(&self, name: &str) -> Option<&User> {
        let record = self.record(name)?;
        record.user.as_ref()
    }

    /// Whether a token that was given to `name` at `revision` is still good.
    pub fn accepts_token(&self, name: &str, revision: u64) -> bool {
        self.record(name)
            .is_some_and(|record| revision >= record.tokens_from && revision <= self.revision)
    }

    /// Whether `authority` may use the keys of a range.
    pub fn check(
        &self,
        authority: &Authority,
        key: &Bytes,
        range_end: &Bytes,
        access: Access,
    ) -> Result<(), RequestError> {
        if !self.enabled {
            return Ok(());
        }
        let user = self.check_user(authority)?;
        if has_root_role(user) {
            return Ok(());
        }
        let wanted = KeyRange::new(key, range_end);
        if covers(self.granted(user, access), &wanted) {
            return Ok(());
        }
        Err(RequestError::PermissionDenied)
    }

    /// Whether `authority` is a user at all, whose rights have not changed since it was found out.
    pub fn check_user(&self, authority: &Authority) -> Result<&User, RequestError> {
        if authority.revision == 0 || authority.user.is_empty() {
            return Err(RequestError::UserEmpty);
        }
        if authority.revision < self.revision {
            return Err(RequestError::AuthOldRevision);
        }
        self.user(&authority.user)
            .ok_or(RequestError::PermissionDenied)
    }

    /// Whether `authority` may administer.
    pub fn check_admin(&self, authority: &Authority) -> Result<(), RequestError> {
        if !self.enabled {
            return Ok(());
        }
        if authority.user.is_empty() {
            return Err(RequestError::UserEmpty);
        }
        match self.user(&authority.user) {
            Some(user) if has_root_role(user) => Ok(()),
            _ => Err(RequestError::PermissionDenied),
        }
    }

    pub(super) fn enable(&mut self, secret: Bytes) -> Result<(), RequestError> {
        if self.enabled {
            return Ok(());
        }
        let root = self.user(ROOT).ok_or(RequestError::RootUserNotExist)?;
        if !has_root_role(root) {
            return Err(RequestError::RootRoleNotExist);
        }
        self.enabled = true;
        self.secret = secret;
        Ok(())
    }

    pub(super) fn disable(&mut self) {
        if self.enabled {
            self.enabled = false;
            self.secret = Bytes::new();
            self.revision += 1;
        }
    }

    pub(super) fn add_user(&mut self, request: pb::AuthUserAddRequest) -> Result<(), RequestError> {
        if request.name.is_empty() {
            return Err(RequestError::UserEmpty);
        }
        let Err(at) = self.find_user(&request.name) else {
            return Err(RequestError::UserExists);
        };
        self.revision += 1;
        let user = User {
            name: request.name.into(),
            password: request.hashed_password.into(),
            roles: Vec::new(),
            options: request.options,
        };
        let record = UserRecord {
            user: Some(user),
            tokens_from: self.revision,
        };
        self.users.insert(at, record);
        Ok(())
    }

    pub(super) fn delete_user(&mut self, name: &str) -> Result<(), RequestError> {
        if self.enabled && name == ROOT {
            return Err(RequestError::InvalidAuthManagement);
        }
        let at = self
            .find_user(name)
            .map_err(|_| RequestError::UserNotFound)?;
        self.users.remove(at);
        self.revision += 1;
        Ok(())
    }

    pub(super) fn change_password(&mut self, name: &str, hash: String) -> Result<(), RequestError> {
        self.revise_user(name, true, |user| {
            let without = user.options.is_some_and(|options| options.no_password);
            if !without {
                user.password = hash.into();
            }
            Ok(true)
        })
    }

    pub(super) fn grant_role(&mut self, name: &str, role: &str) -> Result<(), RequestError> {
        let known = role == ROOT || self.role(role).is_some();
        self.revise_user(name, false, |user| {
            if !known {
                return Err(RequestError::RoleNotFound);
            }
            match user.roles.binary_search_by(|other| other[..].cmp(role)) {
                Ok(_) => Ok(false), // as etcd: it is granted already
                Err(at) => {
                    user.roles.insert(at, role.to_owned());
                    Ok(true)
                }
            }
        })
    }

    pub(super) fn revoke_role(&mut self, name: &str, role: &str) -> Result<(), RequestError> {
        if self.enabled && name == ROOT && role == ROOT {
            return Err(RequestError::InvalidAuthManagement);
        }
        self.revise_user(name, false, |user| {
            let before = user.roles.len();
            user.roles.retain(|other| other != role);
            if user.roles.len() == before {
                return Err(RequestError::RoleNotGranted);
            }
            Ok(true)
        })
    }

    pub(super) fn add_role(&mut self, name: String) -> Result<(), RequestError> {
        if name.is_empty() {
            return Err(RequestError::RoleEmpty);
        }
        let Err(at) = self.find_role(&name) else {
            return Err(RequestError::RoleExists);
        };
        let role = Role {
            name: name.into(),
            key_permission: Vec::new(),
        };
        self.roles.insert(at, role);
        self.revision += 1;
        Ok(())
    }

    pub(super) fn delete_role(&mut self, name: &str) -> Result<(), RequestError> {
        if self.enabled && name == ROOT {
            return Err(RequestError::InvalidAuthManagement);
        }
        let at = self
            .find_role(name)
            .map_err(|_| RequestError::RoleNotFound)?;
        self.roles.remove(at);
        self.revision += 1;
        for user in self
            .users
            .iter_mut()
            .filter_map(|record| record.user.as_mut())
        {
            user.roles.retain(|role| role != name);
        }
        Ok(())
    }

    pub(super) fn grant_permission(
        &mut self,
        request: pb::AuthRoleGrantPermissionRequest,
    ) -> Result<(), RequestError> {
        let permission = request.perm.ok_or(RequestError::PermissionNotGiven)?;
        let range = KeyRange::new(&permission.key, &permission.range_end);
        if permission.key.is_empty() || range.is_empty() {
            return Err(RequestError::InvalidAuthManagement);
        }
        let at = self
            .find_role(&request.name)
            .map_err(|_| RequestError::RoleNotFound)?;
        let permissions = &mut self.roles[at].key_permission;
        let same = permissions
            .iter_mut()
            .find(|other| other.key == permission.key && other.range_end == permission.range_end);
        if let Some(same) = same {
            same.perm_type = permission.perm_type;
        } else {
            let at = permissions.partition_point(|other| other.key <= permission.key);
            permissions.insert(at, permission);
        }
        self.revision += 1;
        Ok(())
    }

    pub(super) fn revoke_permission(
        &mut self,
        request: &pb::AuthRoleRevokePermissionRequest,
    ) -> Result<(), RequestError> {
        let at = self
            .find_role(&request.role)
            .map_err(|_| RequestError::RoleNotFound)?;
        let permissions = &mut self.roles[at].key_permission;
        let before = permissions.len();
        permissions.retain(|permission| {
            permission.key != request.key || permission.range_end != request.range_end
        });
        if permissions.len() == before {
            return Err(RequestError::PermissionNotGranted);
        }
        self.revision += 1;
        Ok(())
    }

    /// A role, if there is one.
    pub fn role(&self, name: &str) -> Option<&Role> {
        self.find_role(name).ok().map(|at| &self.roles[at])
    }

    fn record(&self, name: &str) -> Option<&UserRecord> {
        self.find_user(name).ok().map(|at| &self.users[at])
    }

    fn find_user(&self, name: &str) -> Result<usize, usize> {
        self.users.binary_search_by(|record| {
            let user = record.user.as_ref();
            user.map_or(&b""[..], |user| &user.name)
                .cmp(name.as_bytes())
        })
    }

    fn find_role(&self, name: &str) -> Result<usize, usize> {
        self.roles
            .binary_search_by(|role| role.name[..].cmp(name.as_bytes()))
    }

    /// Changes a user, if `change` says so; its tokens are void afterwards if `void` is set.
    fn revise_user(
        &mut self,
        name: &str,
        void: bool,
        change: impl FnOnce(&mut User) -> Result<bool, RequestError>,
    ) -> Result<(), RequestError> {
        let at = self
            .find_user(name)
            .map_err(|_| RequestError::UserNotFound)?;
        let record = &mut self.users[at];
        let user = record.user.get_or_insert_default();
        if change(user)? {
            self.revision += 1;
            if void {
                record.tokens_from = self.revision;
            }
        }
        Ok(())
    }

    fn granted<'a>(
        &'a self,
        user: &'a User,
        access: Access,
    ) -> impl Iterator<Item = &'a Permission> {
        let roles = user.roles.iter().filter_map(|name| self.role(name));
        roles
            .flat_map(|role| &role.key_permission)
            .filter(move |permission| {
                permission.perm_type == Type::Readwrite as i32
                    || permission.perm_type
                        == match access {
                            Access::Read => Type::Read as i32,
                            Access::Write => Type::Write as i32,
                        }
            })
    }
}

fn has_root_role(user: &User) -> bool {
    user.roles.iter().any(|role| role == ROOT)
}

/// Whether permissions together cover a range, one beginning where another ends.
fn covers<'a>(permissions: impl Iterator<Item = &'a Permission>, wanted: &KeyRange) -> bool {
    let mut ranges: Vec<KeyRange> = permissions
        .map(|permission| KeyRange::new(&permission.key, &permission.range_end))
        .collect();
    if wanted.end == RangeEnd::Single || wanted.is_empty() {
        return ranges.iter().any(|range| range.contains(&wanted.start));
    }
    ranges.sort_by(|a, b| a.start.cmp(&b.start));
    let mut reached = wanted.start.to_vec();
    for range in ranges {
        if range.start[..] > reached[..] {
            return false;
        }
        let Some(end) = end_of(&range) else {
            return true;
        };
        reached = reached.max(end);
        if let RangeEnd::Before(wanted) = &wanted.end
            && reached[..] >= wanted[..]
        {
            return true;
        }
    }
    false
}

/// The first key after a range; `None` if it has no end.
fn end_of(range: &KeyRange) -> Option<Vec<u8>> {
    match &range.end {
        RangeEnd::Open => None,
        RangeEnd::Before(end) => Some(end.to_vec()),
        RangeEnd::Single => Some([&range.start[..], &[0]].concat()),
    }
}
