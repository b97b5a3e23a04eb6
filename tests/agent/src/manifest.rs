//! Manifests of tests.

use std::fmt::Write;
use std::path::Path;

use keelson_vmm_tests::payload;

/// A `VirtualMachine` object: one vCPU, 64 MiB, and the payload guest.
#[derive(Clone, Debug)]
pub struct Guest {
    name: String,
    /// Lines of the spec, indented by two.
    spec: String,
    image: String,
    steps: String,
}

impl Guest {
    /// A guest whose payload takes these steps (see `tests/payload/src/steps/mod.rs`).
    pub fn new(name: &str, steps: &str) -> Self {
        Self {
            name: name.into(),
            spec: String::new(),
            image: payload().to_string_lossy().into_owned(),
            steps: steps.into(),
        }
    }

    /// Boots another image.
    #[must_use]
    pub fn image(mut self, image: &Path) -> Self {
        self.image = image.to_string_lossy().into_owned();
        self
    }

    /// Adds a field to the spec.
    #[must_use]
    pub fn field(mut self, field: &str) -> Self {
        // Writing to a String does not fail.
        let _ = writeln!(self.spec, "  {field}");
        self
    }

    /// The manifest.
    pub fn manifest(&self) -> String {
        let has = |field: &str| self.spec.contains(&format!("  {field}:"));
        let cpus = if has("cpus") { "" } else { "  cpus: 1\n" };
        let memory = if has("memory") {
            ""
        } else {
            "  memory: 64Mi\n"
        };
        format!(
            "---\napiVersion: keelson.dev/v1alpha1\nkind: VirtualMachine\nmetadata: {{name: {}}}\nspec:\n\
             {cpus}{memory}  kernel: {{image: {}, commandLine: \"console=ttyS0 -- {}\"}}\n{}",
            self.name, self.image, self.steps, self.spec
        )
    }
}

/// A `Disk` object.
pub fn disk(name: &str, path: &Path) -> String {
    format!(
        "---\napiVersion: keelson.dev/v1alpha1\nkind: Disk\nmetadata: {{name: {name}}}\nspec: {{path: {}}}\n",
        path.display()
    )
}

/// A `Network` object.
pub fn network(name: &str, subnet: &str, gateway: &str) -> String {
    format!(
        "---\napiVersion: keelson.dev/v1alpha1\nkind: Network\nmetadata: {{name: {name}}}\n\
         spec: {{subnet: {subnet}, gateway: {gateway}}}\n"
    )
}

/// A `SecurityGroup` object that lets in what the rules, in YAML, say.
pub fn security_group(name: &str, ingress: &str) -> String {
    format!(
        "---\napiVersion: keelson.dev/v1alpha1\nkind: SecurityGroup\nmetadata: {{name: {name}}}\n\
         spec: {{ingress: [{ingress}]}}\n"
    )
}
