//! `keelson get`

use clap::Args;
use futures::TryStreamExt;
use keelson_api::Kind;
use keelson_api::proto::WatchRequest;
use keelson_api::proto::watch_event::Type;

use crate::client::{Client, decode};
use crate::failure::Failure;
use crate::output::{Format, line, print_objects};

/// List objects, or show one.
#[derive(Args)]
pub struct Get {
    /// vm, disk, net, pf, sg, svc or host; long names and plurals do as well.
    kind: Kind,
    /// Only the object of this name.
    name: Option<String>,
    /// How to print.
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
    /// Go on with every change.
    #[arg(short, long)]
    watch: bool,
}

impl Get {
    /// Runs the command.
    pub async fn run(self, client: &mut Client) -> Result<(), Failure> {
        if self.watch {
            return self.follow(client).await;
        }
        match &self.name {
            Some(name) => {
                let object = client.get(self.kind, name).await?;
                print_objects(self.output, &[object], true)
            }
            None => print_objects(self.output, &client.list(self.kind).await?, false),
        }
    }

    async fn follow(self, client: &mut Client) -> Result<(), Failure> {
        let name = self.name.unwrap_or_default();
        let request = WatchRequest {
            kind: self.kind.to_string(),
            name,
        };
        let mut events = client.objects.watch(request).await?.into_inner();
        while let Some(event) = events.try_next().await? {
            match (event.r#type(), event.object) {
                (Type::Added | Type::Modified, Some(object)) => {
                    print_objects(self.output, &[decode(&object)?], true)?;
                }
                (Type::Deleted, Some(object)) => {
                    line(&format!("{}/{} deleted", object.kind, object.name))?;
                }
                _ => {}
            }
        }
        Ok(())
    }
}
