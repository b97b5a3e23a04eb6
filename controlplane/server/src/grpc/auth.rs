//! Users, roles and permissions.

use std::sync::Arc;
use std::time::Duration;

use keelson_etcd_api::etcdserverpb as pb;
use keelson_member::RequestError;
use keelson_member::command::{AuthChange, AuthOperation, Operation};
use pb::auth_server::Auth;
use tokio::sync::Semaphore;
use tonic::{Request, Response, Status};

use super::credentials::Credentials;
use super::{Services, refused};
use crate::token::{self, Token};

/// Longest password: what is hashed of one.
const MAX_PASSWORD_BYTES: usize = 72;

/// How passwords are hashed and tokens given.
#[derive(Debug, Clone)]
pub struct Passwords {
    /// bcrypt's cost.
    pub cost: u32,
    /// How long a token is good for.
    pub token_lifetime: Duration,
    /// Hashes that are calculated at once: each takes a processor for a while.
    pub at_once: Arc<Semaphore>,
}

#[tonic::async_trait]
impl Auth for Services {
    async fn auth_enable(
        &self,
        request: Request<pb::AuthEnableRequest>,
    ) -> Result<Response<pb::AuthEnableResponse>, Status> {
        let secret = token::new_secret().into();
        self.change_auth(&request, AuthOperation::Enable(secret))
            .await?;
        Ok(Response::new(pb::AuthEnableResponse {
            header: self.current_header(),
        }))
    }

    async fn auth_disable(
        &self,
        request: Request<pb::AuthDisableRequest>,
    ) -> Result<Response<pb::AuthDisableResponse>, Status> {
        let operation = AuthOperation::Disable(*request.get_ref());
        self.change_auth(&request, operation).await?;
        Ok(Response::new(pb::AuthDisableResponse {
            header: self.current_header(),
        }))
    }

    async fn auth_status(
        &self,
        request: Request<pb::AuthStatusRequest>,
    ) -> Result<Response<pb::AuthStatusResponse>, Status> {
        self.linearize().await?;
        self.require_admin(&request)?;
        let (enabled, revision) = self
            .node
            .keyspace()
            .with_auth(|auth| (auth.enabled, auth.revision));
        Ok(Response::new(pb::AuthStatusResponse {
            header: self.current_header(),
            enabled,
            auth_revision: revision,
        }))
    }

    async fn authenticate(
        &self,
        request: Request<pb::AuthenticateRequest>,
    ) -> Result<Response<pb::AuthenticateResponse>, Status> {
        let request = request.into_inner();
        self.linearize().await?;
        let token = self
            .authenticated(request)
            .await
            .map_err(|error| refused(&error))?;
        Ok(Response::new(pb::AuthenticateResponse {
            header: self.current_header(),
            token,
        }))
    }

    async fn user_add(
        &self,
        request: Request<pb::AuthUserAddRequest>,
    ) -> Result<Response<pb::AuthUserAddResponse>, Status> {
        let credentials = self.credentials(&request);
        let mut request = request.into_inner();
        let password = std::mem::take(&mut request.password);
        if !request.options.is_some_and(|options| options.no_password) {
            request.hashed_password = self.hashed(password).await?;
        }
        self.change_auth_as(&credentials, AuthOperation::UserAdd(request))
            .await?;
        Ok(Response::new(pb::AuthUserAddResponse {
            header: self.current_header(),
        }))
    }

    async fn user_get(
        &self,
        request: Request<pb::AuthUserGetRequest>,
    ) -> Result<Response<pb::AuthUserGetResponse>, Status> {
        self.linearize().await?;
        let credentials = self.credentials(&request);
        let name = request.into_inner().name;
        let authority = self
            .authority(&credentials)
            .map_err(|error| refused(&error))?;
        let roles = self
            .node
            .keyspace()
            .with_auth(|auth| {
                // Who may not administer may see itself.
                match auth.check_admin(&authority) {
                    Err(_) if authority.user == name => {}
                    other => other?,
                }
                let user = auth.user(&name).ok_or(RequestError::UserNotFound)?;
                Ok(user.roles.clone())
            })
            .map_err(|error: RequestError| refused(&error))?;
        Ok(Response::new(pb::AuthUserGetResponse {
            header: self.current_header(),
            roles,
        }))
    }

    async fn user_list(
        &self,
        request: Request<pb::AuthUserListRequest>,
    ) -> Result<Response<pb::AuthUserListResponse>, Status> {
        self.linearize().await?;
        self.require_admin(&request)?;
        let users = self.node.keyspace().with_auth(|auth| {
            let users = auth.users.iter().filter_map(|record| record.user.as_ref());
            users.map(|user| text(&user.name)).collect()
        });
        Ok(Response::new(pb::AuthUserListResponse {
            header: self.current_header(),
            users,
        }))
    }

    async fn user_delete(
        &self,
        request: Request<pb::AuthUserDeleteRequest>,
    ) -> Result<Response<pb::AuthUserDeleteResponse>, Status> {
        let operation = AuthOperation::UserDelete(request.get_ref().clone());
        self.change_auth(&request, operation).await?;
        Ok(Response::new(pb::AuthUserDeleteResponse {
            header: self.current_header(),
        }))
    }

    async fn user_change_password(
        &self,
        request: Request<pb::AuthUserChangePasswordRequest>,
    ) -> Result<Response<pb::AuthUserChangePasswordResponse>, Status> {
        let credentials = self.credentials(&request);
        let mut request = request.into_inner();
        let password = std::mem::take(&mut request.password);
        request.hashed_password = self.hashed(password).await?;
        self.change_auth_as(&credentials, AuthOperation::UserChangePassword(request))
            .await?;
        Ok(Response::new(pb::AuthUserChangePasswordResponse {
            header: self.current_header(),
        }))
    }

    async fn user_grant_role(
        &self,
        request: Request<pb::AuthUserGrantRoleRequest>,
    ) -> Result<Response<pb::AuthUserGrantRoleResponse>, Status> {
        let operation = AuthOperation::UserGrantRole(request.get_ref().clone());
        self.change_auth(&request, operation).await?;
        Ok(Response::new(pb::AuthUserGrantRoleResponse {
            header: self.current_header(),
        }))
    }

    async fn user_revoke_role(
        &self,
        request: Request<pb::AuthUserRevokeRoleRequest>,
    ) -> Result<Response<pb::AuthUserRevokeRoleResponse>, Status> {
        let operation = AuthOperation::UserRevokeRole(request.get_ref().clone());
        self.change_auth(&request, operation).await?;
        Ok(Response::new(pb::AuthUserRevokeRoleResponse {
            header: self.current_header(),
        }))
    }

    async fn role_add(
        &self,
        request: Request<pb::AuthRoleAddRequest>,
    ) -> Result<Response<pb::AuthRoleAddResponse>, Status> {
        let operation = AuthOperation::RoleAdd(request.get_ref().clone());
        self.change_auth(&request, operation).await?;
        Ok(Response::new(pb::AuthRoleAddResponse {
            header: self.current_header(),
        }))
    }

    async fn role_get(
        &self,
        request: Request<pb::AuthRoleGetRequest>,
    ) -> Result<Response<pb::AuthRoleGetResponse>, Status> {
        self.linearize().await?;
        let credentials = self.credentials(&request);
        let name = request.into_inner().role;
        let authority = self
            .authority(&credentials)
            .map_err(|error| refused(&error))?;
        let perm = self
            .node
            .keyspace()
            .with_auth(|auth| {
                // Who may not administer may see the roles that it has.
                let own = auth
                    .user(&authority.user)
                    .is_some_and(|user| user.roles.contains(&name));
                match auth.check_admin(&authority) {
                    Err(_) if own => {}
                    other => other?,
                }
                let role = auth.role(&name).ok_or(RequestError::RoleNotFound)?;
                Ok(role.key_permission.clone())
            })
            .map_err(|error: RequestError| refused(&error))?;
        Ok(Response::new(pb::AuthRoleGetResponse {
            header: self.current_header(),
            perm,
        }))
    }

    async fn role_list(
        &self,
        request: Request<pb::AuthRoleListRequest>,
    ) -> Result<Response<pb::AuthRoleListResponse>, Status> {
        self.linearize().await?;
        self.require_admin(&request)?;
        let roles = self
            .node
            .keyspace()
            .with_auth(|auth| auth.roles.iter().map(|role| text(&role.name)).collect());
        Ok(Response::new(pb::AuthRoleListResponse {
            header: self.current_header(),
            roles,
        }))
    }

    async fn role_delete(
        &self,
        request: Request<pb::AuthRoleDeleteRequest>,
    ) -> Result<Response<pb::AuthRoleDeleteResponse>, Status> {
        let operation = AuthOperation::RoleDelete(request.get_ref().clone());
        self.change_auth(&request, operation).await?;
        Ok(Response::new(pb::AuthRoleDeleteResponse {
            header: self.current_header(),
        }))
    }

    async fn role_grant_permission(
        &self,
        request: Request<pb::AuthRoleGrantPermissionRequest>,
    ) -> Result<Response<pb::AuthRoleGrantPermissionResponse>, Status> {
        let operation = AuthOperation::RoleGrantPermission(request.get_ref().clone());
        self.change_auth(&request, operation).await?;
        Ok(Response::new(pb::AuthRoleGrantPermissionResponse {
            header: self.current_header(),
        }))
    }

    async fn role_revoke_permission(
        &self,
        request: Request<pb::AuthRoleRevokePermissionRequest>,
    ) -> Result<Response<pb::AuthRoleRevokePermissionResponse>, Status> {
        let operation = AuthOperation::RoleRevokePermission(request.get_ref().clone());
        self.change_auth(&request, operation).await?;
        Ok(Response::new(pb::AuthRoleRevokePermissionResponse {
            header: self.current_header(),
        }))
    }
}

impl Services {
    async fn change_auth<T>(
        &self,
        request: &Request<T>,
        operation: AuthOperation,
    ) -> Result<(), Status> {
        let credentials = self.credentials(request);
        self.change_auth_as(&credentials, operation).await
    }

    async fn change_auth_as(
        &self,
        credentials: &Credentials,
        operation: AuthOperation,
    ) -> Result<(), Status> {
        let change = AuthChange {
            operation: Some(operation),
        };
        self.write(credentials, Operation::Auth(change))
            .await
            .map(drop)
    }

    async fn hashed(&self, password: String) -> Result<String, Status> {
        if password.len() > MAX_PASSWORD_BYTES {
            return Err(Status::invalid_argument(format!(
                "the password has more than {MAX_PASSWORD_BYTES} bytes"
            )));
        }
        let cost = self.passwords.cost;
        self.calculate(move || bcrypt::hash(password, cost))
            .await
            .map_err(|error| Status::internal(error.to_string()))
    }

    /// A token for a user who knows the password.
    async fn authenticated(
        &self,
        request: pb::AuthenticateRequest,
    ) -> Result<String, RequestError> {
        let keyspace = self.node.keyspace();
        let (hash, revision) = keyspace.with_auth(|auth| {
            if !auth.enabled {
                return Err(RequestError::AuthNotEnabled);
            }
            let user = auth.user(&request.name).ok_or(RequestError::AuthFailed)?;
            if user.options.is_some_and(|options| options.no_password) {
                return Err(RequestError::AuthFailed);
            }
            Ok((text(&user.password), auth.revision))
        })?;
        let password = request.password;
        let verified = self
            .calculate(move || bcrypt::verify(password, &hash))
            .await
            .unwrap_or(false);
        if !verified {
            return Err(RequestError::AuthFailed);
        }
        // As of when the password was good: if it was changed meanwhile, the token is void.
        let token = Token {
            user: request.name,
            revision,
        };
        let lifetime = self.passwords.token_lifetime;
        keyspace
            .with_auth(|auth| token.sign(&auth.secret, lifetime))
            .ok_or(RequestError::AuthNotEnabled)
    }

    async fn calculate<T: Send + 'static>(
        &self,
        hash: impl FnOnce() -> bcrypt::BcryptResult<T> + Send + 'static,
    ) -> anyhow::Result<T> {
        let _permit = self.passwords.at_once.acquire().await?;
        Ok(tokio::task::spawn_blocking(hash).await??)
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
