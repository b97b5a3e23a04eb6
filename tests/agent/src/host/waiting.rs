//! What is waited for on a host.

use keelson_vmm_tests::wait_until;
use serde_json::Value;

use super::Host;

impl Host {
    /// Waits until a guest's status is as `holds` wants it.
    ///
    /// # Panics
    /// With the status that it stays in.
    #[track_caller]
    pub fn wait_for_status(
        &self,
        guest: &str,
        what: &str,
        holds: impl Fn(&Value) -> bool,
    ) -> Value {
        self.wait_for_object("vm", guest, what, holds)
    }

    /// Waits until an object's status is as `holds` wants it.
    ///
    /// # Panics
    /// With the status that it stays in.
    #[track_caller]
    pub fn wait_for_object(
        &self,
        kind: &str,
        name: &str,
        what: &str,
        holds: impl Fn(&Value) -> bool,
    ) -> Value {
        let mut last = Value::Null;
        let found = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            wait_until(what, || {
                last = self.object(kind, name)["status"].clone();
                holds(&last).then(|| last.clone())
            })
        }));
        found.unwrap_or_else(|_| panic!("no {what}: {last:#}\n{}", self.agent_log()))
    }

    /// Waits until a guest is in a phase.
    ///
    /// # Panics
    /// If it doesn't get there.
    #[track_caller]
    pub fn wait_for_phase(&self, guest: &str, phase: &str) -> Value {
        self.wait_for_status(guest, phase, |status| status["phase"] == phase)
    }

    /// Waits until the reason of a guest's `Ready` condition is `reason`; its message.
    ///
    /// # Panics
    /// If it doesn't get so.
    #[track_caller]
    pub fn wait_for_reason(&self, guest: &str, reason: &str) -> String {
        let status = self.wait_for_status(guest, reason, |status| {
            ready(status).is_some_and(|ready| ready["reason"] == reason)
        });
        ready(&status).expect("it was there")["message"]
            .as_str()
            .unwrap_or_default()
            .to_owned()
    }

    /// Waits until a guest's console said `text`.
    ///
    /// # Panics
    /// If it doesn't.
    #[track_caller]
    pub fn wait_for_console(&self, guest: &str, text: &str) {
        wait_until(&format!("{text:?} on {guest}'s console"), || {
            let log = self.keelson(&["logs", guest]).output;
            log.contains(text).then_some(())
        });
    }
}

/// The `Ready` condition of a status.
fn ready(status: &Value) -> Option<&Value> {
    let conditions = status["conditions"].as_array()?;
    conditions
        .iter()
        .find(|condition| condition["type"] == "Ready")
}
