//! Tokens of users: what a client shows instead of its password.
//!
//! A token says whose it is, as of which revision of users and roles, and until when; it is signed
//! with a secret that the cluster replicates. So every member accepts it, also after a restart,
//! and none has to remember it.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::Sha256;

/// What a token says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Token {
    /// The user.
    pub user: String,
    /// Revision of users and roles when it was given.
    pub revision: u64,
}

/// A secret to sign tokens with.
pub fn new_secret() -> Vec<u8> {
    let halves = [uuid::Uuid::new_v4(), uuid::Uuid::new_v4()];
    halves.iter().flat_map(|half| *half.as_bytes()).collect()
}

impl Token {
    /// The token as clients get it.
    pub fn sign(&self, secret: &[u8], lifetime: Duration) -> Option<String> {
        let until = SystemTime::now().checked_add(lifetime)?;
        let until = until.duration_since(UNIX_EPOCH).ok()?.as_secs();
        let user = hex(self.user.as_bytes());
        let said = format!("{user}.{}.{until}", self.revision);
        let signature = mac(secret, &said)?.finalize().into_bytes();
        Some(format!("{said}.{}", hex(&signature)))
    }

    /// What a token says, if it was signed with the secret and its time is not over.
    pub fn verify(text: &str, secret: &[u8]) -> Option<Self> {
        let (said, signature) = text.rsplit_once('.')?;
        // In constant time.
        mac(secret, said)?.verify_slice(&unhex(signature)?).ok()?;
        let mut parts = said.split('.');
        let user = String::from_utf8(unhex(parts.next()?)?).ok()?;
        let revision = parts.next()?.parse().ok()?;
        let until: u64 = parts.next()?.parse().ok()?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).ok()?;
        (now.as_secs() < until).then_some(Self { user, revision })
    }
}

fn mac(secret: &[u8], said: &str) -> Option<Hmac<Sha256>> {
    if secret.is_empty() {
        return None;
    }
    let mut mac = Hmac::<Sha256>::new_from_slice(secret).ok()?;
    mac.update(said.as_bytes());
    Some(mac)
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    let mut text = String::with_capacity(2 * bytes.len());
    for byte in bytes {
        let _ = write!(text, "{byte:02x}");
    }
    text
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    if !text.is_ascii() || !text.len().is_multiple_of(2) {
        return None;
    }
    (0..text.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&text[at..at + 2], 16).ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_signed_is_accepted() {
        let token = Token {
            user: "Zoë".into(),
            revision: 7,
        };
        let secret = new_secret();
        let text = token
            .sign(&secret, Duration::from_mins(1))
            .expect("it is signed");
        assert_eq!(Token::verify(&text, &secret), Some(token.clone()));
        assert_eq!(Token::verify(&text, &new_secret()), None);
        assert_eq!(Token::verify(&text, &[]), None);
        for at in 0..text.len() {
            let mut other = text.clone().into_bytes();
            other[at] = if other[at] == b'1' { b'2' } else { b'1' };
            let other = String::from_utf8(other).expect("it is text");
            assert_eq!(Token::verify(&other, &secret), None, "{other}");
        }
        let over = token.sign(&secret, Duration::ZERO).expect("it is signed");
        assert_eq!(Token::verify(&over, &secret), None);
        assert_eq!(Token::verify("é.1.2.3", &secret), None);
    }
}
