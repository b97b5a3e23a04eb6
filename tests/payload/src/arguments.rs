//! Steps and their arguments, as they stand on the command line.

use crate::error::Error;

/// What separates the kernel's own parameters from the steps, as from an init program's arguments.
const SEPARATOR: &str = "--";

/// The steps of a command line, in order; none without a separator.
pub fn steps(command_line: &str) -> impl Iterator<Item = Step<'_>> {
    let words = command_line.split_ascii_whitespace();
    let steps = words.skip_while(|word| *word != SEPARATOR).skip(1);
    steps.map(|text| {
        let (name, arguments) = text.split_once(':').unwrap_or((text, ""));
        Step {
            name,
            arguments: Arguments { text: arguments },
        }
    })
}

/// One step.
#[derive(Clone, Copy, Debug)]
pub struct Step<'a> {
    /// Its name.
    pub name: &'a str,
    /// What stands after the colon.
    pub arguments: Arguments<'a>,
}

/// `key=value,key=value`.
#[derive(Clone, Copy, Debug)]
pub struct Arguments<'a> {
    text: &'a str,
}

impl<'a> Arguments<'a> {
    /// Refuses keys that the step doesn't know, so that a misspelt one can't pass unseen.
    pub fn allow(&self, keys: &[&str]) -> Result<(), Error> {
        let known = |(key, _): (&str, &str)| keys.contains(&key);
        if self.pairs().all(known) {
            Ok(())
        } else {
            Err(Error::BadArgument)
        }
    }

    /// The value of a key.
    pub fn text(&self, key: &str) -> Option<&'a str> {
        self.pairs()
            .find(|(name, _)| *name == key)
            .map(|(_, value)| value)
    }

    /// A whole number, decimal or, after `0x`, hexadecimal.
    pub fn number(&self, key: &str, default: u64) -> Result<u64, Error> {
        let Some(text) = self.text(key) else {
            return Ok(default);
        };
        let parsed = match text.strip_prefix("0x") {
            Some(digits) => u64::from_str_radix(digits, 16),
            None => text.parse(),
        };
        parsed.map_err(|_| Error::BadArgument)
    }

    /// A number from `lowest` to `highest`.
    pub fn ranged(&self, key: &str, default: u64, lowest: u64, highest: u64) -> Result<u64, Error> {
        let value = self.number(key, default)?;
        if (lowest..=highest).contains(&value) {
            Ok(value)
        } else {
            Err(Error::BadArgument)
        }
    }

    /// An IPv4 address in dotted form.
    pub fn address(&self, key: &str) -> Result<Option<[u8; 4]>, Error> {
        self.bytes(key, '.', 10)
    }

    /// A MAC address in colon form.
    pub fn mac(&self, key: &str) -> Result<Option<[u8; 6]>, Error> {
        self.bytes(key, ':', 16)
    }

    fn bytes<const COUNT: usize>(
        &self,
        key: &str,
        separator: char,
        radix: u32,
    ) -> Result<Option<[u8; COUNT]>, Error> {
        let Some(text) = self.text(key) else {
            return Ok(None);
        };
        let mut bytes = [0; COUNT];
        let mut parts = text.split(separator);
        for byte in &mut bytes {
            let part = parts.next().ok_or(Error::BadArgument)?;
            *byte = u8::from_str_radix(part, radix).map_err(|_| Error::BadArgument)?;
        }
        if parts.next().is_some() {
            Err(Error::BadArgument)
        } else {
            Ok(Some(bytes))
        }
    }

    fn pairs(&self) -> impl Iterator<Item = (&'a str, &'a str)> + use<'a> {
        let parts = self.text.split(',').filter(|part| !part.is_empty());
        parts.map(|part| part.split_once('=').unwrap_or((part, "")))
    }
}
