//! `keelson delete`

use std::path::PathBuf;

use clap::Args;
use keelson_api::proto::DeleteRequest;
use keelson_api::{Kind, Object, TimeLimit, manifest};

use crate::apply;
use crate::client::Client;
use crate::failure::Failure;
use crate::output::line;
use crate::wait;

/// Delete objects, and what belongs to them.
#[derive(Args)]
pub struct Delete {
    /// vm, disk, net, pf, sg, svc or host; long names and plurals do as well.
    #[arg(required_unless_present = "filename", requires = "names")]
    kind: Option<Kind>,
    /// The objects' names.
    names: Vec<String>,
    /// Delete the objects of this manifest; - for standard input.
    #[arg(short, long, conflicts_with_all = ["kind", "names"])]
    filename: Option<PathBuf>,
    /// Do not wait until guests are shut down and gone.
    #[arg(long)]
    no_wait: bool,
    /// How long to wait.
    #[arg(long, default_value = "2m")]
    timeout: TimeLimit,
}

impl Delete {
    /// Runs the command.
    pub async fn run(self, client: &mut Client) -> Result<(), Failure> {
        let mut targets = self.targets()?;
        // Guests refer to all the rest, services and forwards to networks.
        targets.sort_by_key(|(kind, _)| match kind {
            Kind::VirtualMachine => 0,
            Kind::Service | Kind::PortForward => 1,
            _ => 2,
        });
        for (kind, name) in targets {
            let request = DeleteRequest {
                kind: kind.to_string(),
                name: name.clone(),
            };
            client.objects.delete(request).await?;
            if kind == Kind::VirtualMachine && !self.no_wait {
                let limit = self.timeout.duration();
                wait::until(client, kind, &name, limit, "deleted", |object| {
                    object.is_none()
                })
                .await?;
            }
            line(&format!("{kind}/{name} deleted"))?;
        }
        Ok(())
    }

    fn targets(&self) -> Result<Vec<(Kind, String)>, Failure> {
        if let Some(kind) = self.kind {
            return Ok(self.names.iter().map(|name| (kind, name.clone())).collect());
        }
        let Some(path) = &self.filename else {
            return Ok(Vec::new());
        };
        let mut targets = Vec::new();
        for document in manifest::parse(&apply::read(path)?)? {
            let object = Object::from_json(&document)?;
            targets.push((object.kind(), object.metadata().name.clone()));
        }
        Ok(targets)
    }
}
