//! `keelson wait`

use std::time::Duration;

use clap::Args;
use futures::TryStreamExt;
use keelson_api::proto::WatchRequest;
use keelson_api::proto::watch_event::Type;
use keelson_api::{ConditionStatus, Kind, Object, TimeLimit};
use serde_json::Value;

use crate::client::{Client, decode};
use crate::failure::Failure;
use crate::output::line;

/// Wait until an object is in a condition.
#[derive(Args)]
pub struct Wait {
    /// vm, disk, net, pf, sg, svc or host; long names and plurals do as well.
    kind: Kind,
    /// The object's name.
    name: String,
    /// A condition that is true, such as Ready; a phase, such as phase=Running; or deleted.
    #[arg(long = "for", default_value = "Ready")]
    condition: String,
    /// How long to wait.
    #[arg(long, default_value = "1m")]
    timeout: TimeLimit,
}

impl Wait {
    /// Runs the command.
    pub async fn run(self, client: &mut Client) -> Result<(), Failure> {
        let condition = self.condition.clone();
        let limit = self.timeout.duration();
        let reached = |object: Option<&Object>| match object {
            None => condition == "deleted",
            Some(object) => holds(object, &condition),
        };
        until(
            client,
            self.kind,
            &self.name,
            limit,
            &self.condition,
            reached,
        )
        .await?;
        line(&format!(
            "{}/{} is {}",
            self.kind, self.name, self.condition
        ))
    }
}

fn holds(object: &Object, condition: &str) -> bool {
    let value = serde_json::to_value(object).unwrap_or_default();
    if let Some(phase) = condition.strip_prefix("phase=") {
        return value.pointer("/status/phase").and_then(Value::as_str) == Some(phase);
    }
    let conditions = value
        .pointer("/status/conditions")
        .and_then(Value::as_array);
    let expected = serde_json::to_value(ConditionStatus::True).unwrap_or_default();
    conditions.into_iter().flatten().any(|entry| {
        entry.get("type").and_then(Value::as_str) == Some(condition)
            && entry.get("status") == Some(&expected)
    })
}

/// Waits until `reached` holds of an object, which is `None` once it is gone.
///
/// # Errors
/// [`Failure::TimedOut`] with where the object was when the time limit passed.
pub async fn until(
    client: &mut Client,
    kind: Kind,
    name: &str,
    limit: Duration,
    what: &str,
    mut reached: impl FnMut(Option<&Object>) -> bool,
) -> Result<(), Failure> {
    let mut last = String::from("not there");
    let waiting = async {
        let request = WatchRequest {
            kind: kind.to_string(),
            name: name.into(),
        };
        let mut events = client.objects.watch(request).await?.into_inner();
        let mut known = false;
        while let Some(event) = events.try_next().await? {
            let object = match (event.r#type(), &event.object) {
                (Type::Added | Type::Modified, Some(object)) => Some(decode(object)?),
                // Nothing came before the end of the present state: there is no such object.
                (Type::Bookmark, _) if known => continue,
                _ => None,
            };
            known = true;
            if reached(object.as_ref()) {
                return Ok(());
            }
            last = object.map_or("not there".into(), |object| describe(&object));
        }
        Err(Failure::Other(anyhow::anyhow!(
            "the agent ended while it was waited for"
        )))
    };
    match tokio::time::timeout(limit, waiting).await {
        Ok(result) => result,
        Err(_) => Err(Failure::TimedOut(format!(
            "{kind}/{name} was not {what} within {limit:?}; it is {last}"
        ))),
    }
}

/// Where an object is, for the one who waited in vain.
fn describe(object: &Object) -> String {
    let value = serde_json::to_value(object).unwrap_or_default();
    let phase = value
        .pointer("/status/phase")
        .and_then(Value::as_str)
        .unwrap_or("there");
    let message = value
        .pointer("/status/conditions/0/message")
        .and_then(Value::as_str);
    message.map_or(phase.into(), |message| format!("{phase}: {message}"))
}
