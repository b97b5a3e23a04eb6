use std::fmt;

/// What a check may take. Beyond it the verdict is [`Verdict::Undecided`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Steps of the search: requests that are tried on a state.
    pub steps: u64,
    /// States that the search remembers, of about 40 bytes each.
    pub states: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            steps: 50_000_000,
            states: 5_000_000,
        }
    }
}

/// Whether a rule was kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It was.
    Holds,
    /// It was not.
    Broken(Violation),
    /// The limits did not suffice to tell, for this reason. It is not a pass.
    Undecided(String),
}

/// How a rule was broken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// In one sentence.
    pub what: String,
    /// The part of the history that shows it.
    pub excerpt: Vec<String>,
}

/// The verdict on each rule.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// Rules by name, in the order in which they were checked.
    pub verdicts: Vec<(&'static str, Verdict)>,
}

impl Report {
    /// Whether each rule was kept, for certain.
    pub fn holds(&self) -> bool {
        self.verdicts
            .iter()
            .all(|(_, verdict)| *verdict == Verdict::Holds)
    }

    /// The rules that were broken.
    pub fn broken(&self) -> impl Iterator<Item = (&'static str, &Violation)> {
        self.verdicts
            .iter()
            .filter_map(|(rule, verdict)| match verdict {
                Verdict::Broken(violation) => Some((*rule, violation)),
                Verdict::Holds | Verdict::Undecided(_) => None,
            })
    }

    pub(crate) fn add(&mut self, rule: &'static str, verdict: Verdict) {
        self.verdicts.push((rule, verdict));
    }
}

impl Violation {
    pub(crate) fn new(what: impl Into<String>, excerpt: Vec<String>) -> Self {
        Self {
            what: what.into(),
            excerpt,
        }
    }
}

impl From<Violation> for Verdict {
    fn from(violation: Violation) -> Self {
        Self::Broken(violation)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (rule, verdict) in &self.verdicts {
            writeln!(f, "{rule}: {verdict}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Holds => write!(f, "holds"),
            Self::Broken(violation) => write!(f, "BROKEN: {violation}"),
            Self::Undecided(why) => write!(f, "UNDECIDED: {why}"),
        }
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.what)?;
        self.excerpt
            .iter()
            .try_for_each(|line| write!(f, "\n    {line}"))
    }
}
