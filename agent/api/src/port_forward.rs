//! Ports of an uplink that lead to a guest.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::metadata::{Condition, ObjectMeta, validate_name};
use crate::{FieldError, PortRange, ServiceProtocol};

/// The most ports that one object may forward.
const PORT_LIMIT: u16 = 4096;

/// Ports of a network's uplink that lead to a guest in that network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PortForward {
    /// Always [`crate::API_VERSION`].
    pub api_version: String,
    /// Always `PortForward`.
    pub kind: String,
    /// Its name.
    pub metadata: ObjectMeta,
    /// What it should be.
    pub spec: PortForwardSpec,
    /// What the agent observed.
    #[serde(default)]
    pub status: PortForwardStatus,
}

/// What a forward should be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PortForwardSpec {
    /// The `Network` object that the guest is in; its uplink is where packets come.
    pub network: String,
    /// The protocol.
    #[serde(default)]
    pub protocol: ServiceProtocol,
    /// The ports of the uplink's addresses, one or a range, such as `8000-8010`: of each version of IP that
    /// both the uplink and the guest have.
    pub ports: PortRange,
    /// The guest.
    pub guest: String,
    /// Its interface; its first one in the network where not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interface: Option<String>,
    /// The guest's port that the first of `ports` leads to, and so on; the same where not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_port: Option<u16>,
}

impl PortForwardSpec {
    /// Each port with the guest's port that it leads to.
    pub fn pairs(&self) -> impl Iterator<Item = (u16, u16)> + use<> {
        let PortRange { first, last } = self.ports;
        let target = self.target_port.unwrap_or(first);
        // What does not fit is refused.
        (first..=last).filter_map(move |port| Some((port, target.checked_add(port - first)?)))
    }

    /// The guest's ports.
    pub fn targets(&self) -> PortRange {
        let PortRange { first, last } = self.ports;
        let target = self.target_port.unwrap_or(first);
        PortRange {
            first: target,
            last: target.saturating_add(last - first),
        }
    }

    pub(crate) fn validate(&self, errors: &mut Vec<FieldError>) {
        for (field, name) in [("spec.network", &self.network), ("spec.guest", &self.guest)] {
            if let Err(message) = validate_name(name) {
                errors.push(FieldError::new(field, message));
            }
        }
        let length = self.ports.last - self.ports.first;
        if length >= PORT_LIMIT {
            let message = format!(
                "{} are more than {PORT_LIMIT} ports; forward fewer",
                self.ports
            );
            errors.push(FieldError::new("spec.ports", message));
        }
        match self.target_port {
            Some(0) => errors.push(FieldError::new("spec.targetPort", "is 0; give 1 to 65535")),
            Some(target) if target.checked_add(length).is_none() => {
                let message =
                    format!("is {target}, after which there is no room for {length} more");
                errors.push(FieldError::new("spec.targetPort", message));
            }
            _ => {}
        }
    }
}

/// What the agent observed of a forward.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PortForwardStatus {
    /// `Ready`: packets to the ports reach the guest's interface.
    pub conditions: Vec<Condition>,
    /// The first port, by the addresses where others reach it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<SocketAddr>,
}
