//! What of the host a guest's virtual machine may use.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::FieldError;
use crate::units::MemorySize;

/// The least that can be kept to: with less, not even timers are served.
const LEAST_MILLICPUS: u32 = 10;
/// More than any host has.
const MOST_MILLICPUS: u32 = 4_096_000;
/// What keelson-vmm needs beside the guest's memory, at least.
const OVERHEAD_MIB: u64 = 32;

/// What of the host a guest's virtual machine may use, kept by its control group. Not limited where
/// not given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct ResourceLimits {
    /// Processors' time: `2` or `1500m`, in processors and thousandths of them. All vCPUs and the
    /// devices' threads together get no more (`cpu.max`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu: Option<CpuAmount>,
    /// Memory, the guest's own included: at least 32Mi more than that. If it is reached and nothing can
    /// be reclaimed, the virtual machine is killed (`memory.max`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<MemorySize>,
}

/// Processors' time in thousandths of a processor, written as `1500m`, or in whole ones as `2`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "CpuAmountText", into = "String")]
pub struct CpuAmount(u32);

impl CpuAmount {
    /// In thousandths of a processor.
    pub fn millicpus(self) -> u32 {
        self.0
    }
}

impl FromStr for CpuAmount {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let error = || format!("{text:?} is no processors' time; write e.g. 2 or 1500m");
        let (digits, factor) = match text.strip_suffix('m') {
            Some(digits) => (digits, 1),
            None => (text, 1000),
        };
        let plain = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
        let number: u32 = plain
            .then(|| digits.parse().ok())
            .flatten()
            .ok_or_else(error)?;
        number.checked_mul(factor).map(Self).ok_or_else(error)
    }
}

impl fmt::Display for CpuAmount {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_multiple_of(1000) {
            write!(formatter, "{}", self.0 / 1000)
        } else {
            write!(formatter, "{}m", self.0)
        }
    }
}

impl From<CpuAmount> for String {
    fn from(amount: CpuAmount) -> Self {
        amount.to_string()
    }
}

/// Whole processors are often written as a number.
#[derive(Deserialize)]
#[serde(untagged)]
enum CpuAmountText {
    Number(u32),
    Text(String),
}

impl TryFrom<CpuAmountText> for CpuAmount {
    type Error = String;

    fn try_from(text: CpuAmountText) -> Result<Self, String> {
        match text {
            CpuAmountText::Number(number) => number.to_string().parse(),
            CpuAmountText::Text(text) => text.parse(),
        }
    }
}

impl ResourceLimits {
    pub(crate) fn is_unlimited(&self) -> bool {
        *self == Self::default()
    }

    pub(crate) fn validate(&self, memory: MemorySize, errors: &mut Vec<FieldError>) {
        if let Some(cpu) = self.cpu
            && !(LEAST_MILLICPUS..=MOST_MILLICPUS).contains(&cpu.millicpus())
        {
            errors.push(FieldError::new(
                "spec.limits.cpu",
                format!(
                    "is {cpu}; give {LEAST_MILLICPUS}m to {}",
                    MOST_MILLICPUS / 1000
                ),
            ));
        }
        if let Some(limit) = self.memory
            && limit.mib() < memory.mib() + OVERHEAD_MIB
        {
            errors.push(FieldError::new(
                "spec.limits.memory",
                format!(
                    "is {limit}; give at least {OVERHEAD_MIB}Mi more than the guest's memory of {memory}"
                ),
            ));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_are_written_as_they_are_read() {
        for (text, millicpus, written) in [
            ("2", 2000, "2"),
            ("1500m", 1500, "1500m"),
            ("2000m", 2000, "2"),
        ] {
            let amount: CpuAmount = text.parse().unwrap();
            assert_eq!(
                (amount.millicpus(), amount.to_string()),
                (millicpus, written.into())
            );
        }
        for wrong in ["", "m", "-1", "1.5", "2 ", "99999999999", "+1"] {
            assert!(wrong.parse::<CpuAmount>().is_err(), "{wrong}");
        }
    }
}
