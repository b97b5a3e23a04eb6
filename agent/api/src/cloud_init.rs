//! What cloud-init makes of a guest when it boots first.

use std::net::IpAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::FieldError;
use crate::metadata::validate_name;
use crate::object::absolute_path;

/// The largest `userData`, in bytes.
const USER_DATA_LIMIT: usize = 256 << 10;
const LIST_LIMIT: usize = 64;
/// The longest name of a user (useradd(8)).
const USER_NAME_LIMIT: usize = 32;

/// What cloud-init makes of a guest when it boots first. It is handed over on a further disk, as the
/// datasource NoCloud has it, with the addresses of all interfaces.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct CloudInit {
    /// The guest's host name; the name of its object where not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hostname: Option<String>,
    /// Its users. Where none is given, the image's default user is made, and nobody can log in as that.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub users: Vec<CloudInitUser>,
    /// Shell commands that are run once, as root, at the end of the first boot.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub run_commands: Vec<String>,
    /// Name servers, for all interfaces; those of each network where none is given.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub nameservers: Vec<IpAddr>,
    /// Instead of `users` and `runCommands`: cloud-init's user data as it is, such as a
    /// `#cloud-config`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user_data: Option<String>,
}

/// A user of a guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct CloudInitUser {
    /// The name.
    pub name: String,
    /// Public keys that let in by SSH, as in `authorized_keys`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ssh_authorized_keys: Vec<String>,
    /// The password's hash, such as `mkpasswd` makes (crypt(5)). Without it no password lets in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub password_hash: Option<String>,
    /// May do everything by sudo, without a password.
    #[serde(default)]
    pub sudo: bool,
    /// Further groups.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub groups: Vec<String>,
    /// The login shell; `/bin/bash` where not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shell: Option<PathBuf>,
}

impl CloudInit {
    pub(crate) fn validate(&self, errors: &mut Vec<FieldError>) {
        let mut report = |field: &str, message: String| {
            errors.push(FieldError::new(format!("spec.cloudInit.{field}"), message));
        };
        if let Some(Err(message)) = self.hostname.as_deref().map(validate_name) {
            report("hostname", message);
        }
        let lists = [
            ("users", self.users.len()),
            ("runCommands", self.run_commands.len()),
            ("nameservers", self.nameservers.len()),
        ];
        for (field, length) in lists {
            if length > LIST_LIMIT {
                report(
                    field,
                    format!("has {length} entries; at most {LIST_LIMIT} are taken"),
                );
            }
        }
        if let Some(data) = &self.user_data {
            if !self.users.is_empty() || !self.run_commands.is_empty() {
                let message = "goes without users and runCommands, which are made into user data";
                report("userData", message.into());
            }
            if data.len() > USER_DATA_LIMIT {
                let message = format!(
                    "is {} bytes long; at most {USER_DATA_LIMIT} fit",
                    data.len()
                );
                report("userData", message);
            }
            if !data.starts_with('#') && !data.starts_with("Content-Type:") {
                let message = "is of no kind that cloud-init knows; begin with #cloud-config or #!";
                report("userData", message.into());
            }
        }
        for (index, user) in self.users.iter().enumerate() {
            user.validate(&format!("spec.cloudInit.users[{index}]"), errors);
        }
    }
}

impl CloudInitUser {
    fn validate(&self, field: &str, errors: &mut Vec<FieldError>) {
        if !is_user_name(&self.name) {
            errors.push(FieldError::new(
                format!("{field}.name"),
                format!(
                    "{:?} is no name of a user: lower-case letters, digits, _ and -, not beginning with \
                     a digit or -, at most {USER_NAME_LIMIT}",
                    self.name
                ),
            ));
        }
        for (index, group) in self.groups.iter().enumerate() {
            if !is_user_name(group) {
                let message = format!("{group:?} is no name of a group");
                errors.push(FieldError::new(format!("{field}.groups[{index}]"), message));
            }
        }
        for (index, key) in self.ssh_authorized_keys.iter().enumerate() {
            if !is_public_key(key) {
                errors.push(FieldError::new(
                    format!("{field}.sshAuthorizedKeys[{index}]"),
                    "is no public key on one line, such as `ssh-ed25519 AAAA… comment`",
                ));
            }
        }
        let hash = self.password_hash.as_deref();
        if hash.is_some_and(|hash| !hash.starts_with('$') || hash.contains([':', '\n', ' '])) {
            errors.push(FieldError::new(
                format!("{field}.passwordHash"),
                "is no hash of crypt(5), which begins with $; `mkpasswd` makes one",
            ));
        }
        if let Some(shell) = &self.shell {
            absolute_path(&format!("{field}.shell"), shell, errors);
        }
    }
}

fn is_user_name(name: &str) -> bool {
    let first = |c: char| c.is_ascii_lowercase() || c == '_';
    let inner = |c: char| first(c) || c.is_ascii_digit() || c == '-';
    name.len() <= USER_NAME_LIMIT && name.starts_with(first) && name.chars().all(inner)
}

fn is_public_key(key: &str) -> bool {
    let kinds = ["ssh-", "ecdsa-", "sk-ssh-", "sk-ecdsa-"];
    let mut fields = key.split_ascii_whitespace();
    let kind = fields.next().unwrap_or_default();
    let data = fields.next().unwrap_or_default();
    !key.contains(['\n', '\r'])
        && kinds.iter().any(|known| kind.starts_with(known))
        && data.starts_with("AAAA")
}
