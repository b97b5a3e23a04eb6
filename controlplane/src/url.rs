//! The one URL that chooses the backend.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use crate::StateError;
use crate::embedded::{EmbeddedOptions, Retention};
use crate::etcd::{
    Credentials, EtcdOptions, MAX_ENDPOINTS, MAX_PREFIX_BYTES, Server, Tls, TlsIdentity,
};

/// Names a store: a backend, where it is, and its options.
///
/// | URL | Backend |
/// | --- | --- |
/// | `embedded:/var/lib/keelson/state` | in this process, in this directory |
/// | `etcd:http://10.0.0.1:2379,http://10.0.0.2:2379` | an etcd cluster |
/// | `cluster:http://10.0.0.1:2379,http://10.0.0.2:2379` | a cluster of `keelson-state` |
///
/// Options follow behind a `?`, joined by `&`. For `embedded:` `retain_revisions=N` or
/// `retain_minutes=N` (0 retains everything; default 10,000 revisions) and `cache_mib=N` (default
/// 64). For `etcd:` and `cluster:` `prefix=…` (prepended to every key), `timeout_ms=N` (of one request, default
/// 5,000), `connect_timeout_ms=N` (default 2,000), `user=…` and `password_file=PATH`; for endpoints with
/// `https://` also `ca_file=PATH` (who signs their certificates; else whom the system trusts), `cert_file=PATH`
/// and `key_file=PATH` (what they are shown, if they ask for a certificate).
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum StoreUrl {
    /// `embedded:`
    Embedded(EmbeddedOptions),
    /// `etcd:` or `cluster:`
    Etcd(EtcdOptions),
}

impl FromStr for StoreUrl {
    type Err = StateError;

    fn from_str(url: &str) -> Result<Self, StateError> {
        parse(url).map_err(|reason| StateError::InvalidUrl {
            url: without_credentials(url),
            reason,
        })
    }
}

fn parse(url: &str) -> Result<StoreUrl, String> {
    let (scheme, rest) = url
        .split_once(':')
        .ok_or("it has no scheme: write embedded:/DIRECTORY, etcd:http://HOST:2379 or cluster:http://HOST:2379")?;
    let (location, options) = rest.split_once('?').unwrap_or((rest, ""));
    let options = Options::parse(options)?;
    match scheme {
        "embedded" => embedded(location, options).map(StoreUrl::Embedded),
        "etcd" => etcd(location, options, Server::Etcd).map(StoreUrl::Etcd),
        "cluster" => etcd(location, options, Server::KeelsonState).map(StoreUrl::Etcd),
        _ => Err(format!(
            "scheme {scheme:?} is unknown: use embedded:, etcd: or cluster:"
        )),
    }
}

fn embedded(location: &str, mut options: Options<'_>) -> Result<EmbeddedOptions, String> {
    let directory = PathBuf::from(location);
    if !directory.is_absolute() {
        return Err("the directory must be an absolute path: embedded:/DIRECTORY".into());
    }
    let mut embedded = EmbeddedOptions::new(directory);
    let revisions = options.number("retain_revisions", u64::from(u32::MAX))?;
    let minutes = options.number("retain_minutes", 1_000_000)?;
    embedded.retention = match (revisions, minutes) {
        (Some(_), Some(_)) => {
            return Err("retain_revisions and retain_minutes exclude each other".into());
        }
        (Some(0), None) | (None, Some(0)) => Retention::Everything,
        (Some(revisions), None) => {
            Retention::Revisions(u32::try_from(revisions).unwrap_or(u32::MAX))
        }
        (None, Some(minutes)) => Retention::Time(Duration::from_secs(minutes * 60)),
        (None, None) => embedded.retention,
    };
    if let Some(mib) = options.number("cache_mib", 1024 * 1024)? {
        embedded.cache_bytes = usize::try_from(mib * 1024 * 1024).unwrap_or(usize::MAX);
    }
    options.finish()?;
    Ok(embedded)
}

fn etcd(location: &str, mut options: Options<'_>, server: Server) -> Result<EtcdOptions, String> {
    let endpoints: Vec<_> = location
        .split(',')
        .map(endpoint)
        .collect::<Result<_, String>>()?;
    if endpoints.len() > MAX_ENDPOINTS {
        return Err(format!("more than {MAX_ENDPOINTS} endpoints"));
    }
    let mut etcd = EtcdOptions::new(endpoints);
    etcd.server = server;
    if let Some(prefix) = options.take("prefix") {
        if prefix.len() > MAX_PREFIX_BYTES {
            return Err(format!(
                "the prefix is longer than {MAX_PREFIX_BYTES} bytes"
            ));
        }
        etcd.prefix = prefix.as_bytes().to_vec();
    }
    for (name, duration) in [
        ("timeout_ms", &mut etcd.timeout),
        ("connect_timeout_ms", &mut etcd.connect_timeout),
    ] {
        match options.number(name, 600_000)? {
            Some(0) => return Err(format!("option {name}=0: give at least 1")),
            Some(milliseconds) => *duration = Duration::from_millis(milliseconds),
            None => {}
        }
    }
    etcd.credentials = match (options.take("user"), options.take("password_file")) {
        (Some(user), Some(file)) => Some(Credentials {
            user: user.to_owned(),
            password_file: PathBuf::from(file),
        }),
        (None, None) => None,
        _ => return Err("user and password_file belong together".into()),
    };
    etcd.tls = tls(&mut options)?;
    options.finish()?;
    Ok(etcd)
}

fn tls(options: &mut Options<'_>) -> Result<Tls, String> {
    let path = |option: &str| PathBuf::from(option);
    Ok(Tls {
        ca_file: options.take("ca_file").map(path),
        identity: match (options.take("cert_file"), options.take("key_file")) {
            (Some(certificate), Some(key)) => Some(TlsIdentity {
                cert_file: path(certificate),
                key_file: path(key),
            }),
            (None, None) => None,
            _ => return Err("cert_file and key_file belong together".into()),
        },
    })
}

fn endpoint(endpoint: &str) -> Result<String, String> {
    let wrong = |what: &str| {
        let endpoint = without_credentials(endpoint);
        Err(format!("endpoint {endpoint:?}: {what}"))
    };
    let schemes = ["http://", "https://"];
    let scheme = schemes.into_iter().find(|one| endpoint.starts_with(one));
    let Some((scheme, address)) = scheme.and_then(|one| Some((one, endpoint.strip_prefix(one)?)))
    else {
        return wrong("write http://HOST:PORT or https://HOST:PORT");
    };
    if address.contains('@') {
        return wrong("give the user with the options user and password_file");
    }
    let address = address.strip_suffix('/').unwrap_or(address);
    let plain = |host: &str| {
        let other =
            |character: char| !(character.is_alphanumeric() || ".-_:[]%".contains(character));
        !host.is_empty() && !host.contains(other)
    };
    match address.rsplit_once(':') {
        Some((host, port)) if plain(host) && port.parse::<u16>().is_ok_and(|port| port > 0) => {
            Ok(format!("{scheme}{address}"))
        }
        _ => wrong("write http://HOST:PORT or https://HOST:PORT"),
    }
}

/// `url` with what stands between `//` and `@` replaced, for messages.
fn without_credentials(url: &str) -> String {
    let mut parts = url.split("//");
    let mut text = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        text.push_str("//");
        match part.rsplit_once('@') {
            Some((_, address)) => text.extend(["***@", address]),
            None => text.push_str(part),
        }
    }
    text
}

/// The options behind the question mark, each taken once.
struct Options<'a>(Vec<(&'a str, &'a str)>);

impl<'a> Options<'a> {
    fn parse(text: &'a str) -> Result<Self, String> {
        let mut options = Vec::new();
        for option in text.split('&').filter(|option| !option.is_empty()) {
            let (name, value) = option
                .split_once('=')
                .ok_or(format!("option {option:?} has no value"))?;
            if options.iter().any(|(other, _)| *other == name) {
                return Err(format!("option {name} is given twice"));
            }
            options.push((name, value));
        }
        Ok(Self(options))
    }

    fn take(&mut self, name: &str) -> Option<&'a str> {
        let index = self.0.iter().position(|(other, _)| *other == name)?;
        Some(self.0.swap_remove(index).1)
    }

    fn number(&mut self, name: &str, limit: u64) -> Result<Option<u64>, String> {
        let Some(text) = self.take(name) else {
            return Ok(None);
        };
        match text.parse() {
            Ok(number) if number <= limit => Ok(Some(number)),
            _ => Err(format!(
                "option {name}={text}: give a number from 0 to {limit}"
            )),
        }
    }

    fn finish(self) -> Result<(), String> {
        match self.0.first() {
            Some((name, _)) => Err(format!("option {name} is unknown for this backend")),
            None => Ok(()),
        }
    }
}

impl fmt::Display for StoreUrl {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Embedded(options) => {
                write!(formatter, "embedded:{}", options.directory.display())
            }
            Self::Etcd(options) => {
                let scheme = options.server.scheme();
                write!(formatter, "{scheme}:{}", options.endpoints.join(","))?;
                if options.prefix.is_empty() {
                    return Ok(());
                }
                write!(formatter, "?prefix={}", options.prefix.escape_ascii())
            }
        }
    }
}
