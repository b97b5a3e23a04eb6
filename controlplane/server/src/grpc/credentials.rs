//! Who sends a request.

use keelson_member::RequestError;
use keelson_member::command::Authority;
use tonic::{Request, Status};

use super::{Services, refused};
use crate::tls;
use crate::token::Token;

/// Where clients put their token: etcd's clients, and its HTTP gateway's.
const TOKEN_FIELDS: [&str; 2] = ["token", "authorization"];

/// What a client shows of itself.
#[derive(Debug, Clone, Default)]
pub struct Credentials {
    token: Option<String>,
    common_name: Option<String>,
}

impl Services {
    /// What the client of a request shows; nothing if nobody asks.
    pub fn credentials<T>(&self, request: &Request<T>) -> Credentials {
        if !self.node.keyspace().is_auth_enabled() {
            return Credentials::default();
        }
        self.all_credentials(request)
    }

    /// As [`Services::credentials`], for streams, during which it may be asked for.
    pub fn all_credentials<T>(&self, request: &Request<T>) -> Credentials {
        let token = TOKEN_FIELDS
            .iter()
            .find_map(|field| request.metadata().get(*field)?.to_str().ok());
        let common_name = if self.limits.certificate_is_user {
            let certificates = request.peer_certs();
            certificates.and_then(|chain| tls::common_name(chain.first()?))
        } else {
            None
        };
        Credentials {
            token: token.map(str::to_owned),
            common_name,
        }
    }

    /// Whose credentials they are. Nobody's are nobody; a token that is no good is refused.
    pub fn authority(&self, credentials: &Credentials) -> Result<Authority, RequestError> {
        let keyspace = self.node.keyspace();
        if !keyspace.is_auth_enabled() {
            return Ok(Authority::default());
        }
        keyspace.with_auth(|auth| {
            let user = match (&credentials.token, &credentials.common_name) {
                (Some(text), _) => {
                    let token = Token::verify(text, &auth.secret)
                        .filter(|token| auth.accepts_token(&token.user, token.revision))
                        .ok_or(RequestError::InvalidAuthToken)?;
                    token.user
                }
                (None, Some(name)) => name.clone(),
                (None, None) => return Ok(Authority::default()),
            };
            Ok(Authority {
                user,
                revision: auth.revision,
            })
        })
    }

    /// Refuses who is not a user, if users are asked for.
    pub fn require_user<T>(&self, request: &Request<T>) -> Result<Authority, Status> {
        self.require(request, |services, authority| {
            let enabled = services.node.keyspace().is_auth_enabled();
            let known =
                |auth: &keelson_member::keyspace::Auth| auth.check_user(authority).map(drop);
            if enabled {
                services.node.keyspace().with_auth(known)
            } else {
                Ok(())
            }
        })
    }

    /// Refuses who may not administer, if users are asked for.
    pub fn require_admin<T>(&self, request: &Request<T>) -> Result<Authority, Status> {
        self.require(request, |services, authority| {
            let keyspace = services.node.keyspace();
            keyspace.with_auth(|auth| auth.check_admin(authority))
        })
    }

    fn require<T>(
        &self,
        request: &Request<T>,
        check: impl FnOnce(&Self, &Authority) -> Result<(), RequestError>,
    ) -> Result<Authority, Status> {
        self.authority(&self.credentials(request))
            .and_then(|authority| check(self, &authority).map(|()| authority))
            .map_err(|error| refused(&error))
    }
}
