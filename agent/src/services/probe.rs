//! Health checks: TCP connections from this host to a guest.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use keelson_api::{Health, HealthCheck};
use tokio::net::TcpStream;
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;

/// What is checked, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// The guest's address and port.
    pub address: SocketAddr,
    /// How.
    pub check: HealthCheck,
    /// Where the host's connections come from, for messages.
    pub gateway: IpAddr,
}

/// What the checks say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Whether the guest serves.
    pub health: Health,
    /// Why.
    pub message: String,
}

/// Checks a guest for as long as it lives.
#[derive(Debug)]
pub struct Probe {
    /// What it checks.
    pub target: Target,
    found: watch::Receiver<Finding>,
    task: JoinHandle<()>,
}

impl Probe {
    /// Starts to check; `before` holds until the checks say something else, and `changed` is told when
    /// they do.
    pub fn start(target: Target, before: Finding, changed: Arc<Notify>) -> Self {
        let (say, found) = watch::channel(before);
        let task = tokio::spawn(run(target, say, changed));
        Self {
            target,
            found,
            task,
        }
    }

    /// What the checks say now.
    pub fn finding(&self) -> Finding {
        self.found.borrow().clone()
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn run(target: Target, say: watch::Sender<Finding>, changed: Arc<Notify>) {
    let mut ticks = tokio::time::interval(target.check.interval.duration());
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut streak = Streak::default();
    loop {
        ticks.tick().await;
        let outcome = connect(&target).await;
        let before = say.borrow().clone();
        let after = streak.judge(&target.check, &before, outcome);
        if after != before {
            let is_news = after.health != before.health;
            say.send_replace(after);
            if is_news {
                changed.notify_one();
            }
        }
    }
}

/// Connects once, and closes by a reset, so that a check leaves nothing behind on either side.
async fn connect(target: &Target) -> Result<(), String> {
    let limit: Duration = target.check.timeout.duration();
    match tokio::time::timeout(limit, TcpStream::connect(target.address)).await {
        Ok(Ok(stream)) => {
            // Without it the connection is closed as any other.
            let _ = stream.set_zero_linger();
            Ok(())
        }
        Ok(Err(error)) => Err(format!("connecting to {}: {error}", target.address)),
        Err(_) => Err(format!(
            "connecting to {} took longer than {}; do its security groups let tcp {} in from {}?",
            target.address,
            target.check.timeout,
            target.address.port(),
            target.gateway
        )),
    }
}

/// Checks in a row with the same outcome.
#[derive(Debug, Default)]
struct Streak {
    succeeded: u32,
    failed: u32,
}

impl Streak {
    fn judge(
        &mut self,
        check: &HealthCheck,
        before: &Finding,
        outcome: Result<(), String>,
    ) -> Finding {
        match outcome {
            Ok(()) => {
                self.succeeded = self.succeeded.saturating_add(1);
                self.failed = 0;
                let is_healthy = before.health == Health::Healthy;
                if is_healthy || self.succeeded >= check.healthy_threshold {
                    return Finding {
                        health: Health::Healthy,
                        message: "it takes connections".into(),
                    };
                }
            }
            Err(message) => {
                self.failed = self.failed.saturating_add(1);
                self.succeeded = 0;
                let is_unhealthy = before.health == Health::Unhealthy;
                if is_unhealthy || self.failed >= check.unhealthy_threshold {
                    return Finding {
                        health: Health::Unhealthy,
                        message,
                    };
                }
            }
        }
        before.clone()
    }
}

impl fmt::Display for Target {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}", self.address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check() -> HealthCheck {
        HealthCheck {
            healthy_threshold: 2,
            unhealthy_threshold: 3,
            ..HealthCheck::default()
        }
    }

    fn after(before: Health, outcomes: &[bool]) -> Vec<Health> {
        let mut streak = Streak::default();
        let mut finding = Finding {
            health: before,
            message: String::new(),
        };
        let outcomes = outcomes.iter().map(|succeeds| {
            let outcome = if *succeeds {
                Ok(())
            } else {
                Err("refused".into())
            };
            finding = streak.judge(&check(), &finding, outcome);
            finding.health
        });
        outcomes.collect()
    }

    #[test]
    fn thresholds_count_outcomes_in_a_row() {
        use Health::{Healthy, Unhealthy, Unknown};
        assert_eq!(
            after(Unknown, &[true, false, true, true]),
            [Unknown, Unknown, Unknown, Healthy]
        );
        assert_eq!(
            after(
                Healthy,
                &[false, false, true, false, false, false, true, true]
            ),
            [
                Healthy, Healthy, Healthy, Healthy, Healthy, Unhealthy, Unhealthy, Healthy
            ]
        );
    }

    /// What an earlier agent found holds until checks say otherwise.
    #[test]
    fn a_healthy_guest_stays_so_with_the_next_success() {
        assert_eq!(after(Health::Healthy, &[true]), [Health::Healthy]);
    }
}
