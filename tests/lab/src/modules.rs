//! Which module files a kernel needs for a list of module names, in the order to load them.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;

use crate::error::file;
use crate::{KernelFiles, LabError};

/// The modules of one kernel, from `modules.dep` and `modules.builtin` (see depmod(8)).
pub(crate) struct ModuleIndex {
    release: String,
    folder: PathBuf,
    /// Module name → its path below the module folder, and those of all it depends on.
    dependencies: HashMap<String, (String, Vec<String>)>,
    built_in: HashSet<String>,
}

impl ModuleIndex {
    pub(crate) fn read(kernel: &KernelFiles) -> Result<Self, LabError> {
        let read = |name: &str| {
            let path = kernel.modules.join(name);
            std::fs::read_to_string(&path).map_err(file("read", &path))
        };
        Ok(Self::parse(
            kernel,
            &read("modules.dep")?,
            &read("modules.builtin")?,
        ))
    }

    fn parse(kernel: &KernelFiles, modules_dep: &str, modules_builtin: &str) -> Self {
        let dependencies = modules_dep
            .lines()
            .filter_map(|line| line.split_once(':'))
            .map(|(path, needs)| {
                let needs = needs.split_whitespace().map(str::to_owned).collect();
                (module_name(path), (path.to_owned(), needs))
            })
            .collect();
        Self {
            release: kernel.release.clone(),
            folder: kernel.modules.clone(),
            dependencies,
            built_in: modules_builtin.lines().map(module_name).collect(),
        }
    }

    /// Whether the kernel has a module, built in or not.
    pub(crate) fn has(&self, module: &str) -> bool {
        let name = module_name(module);
        self.built_in.contains(&name) || self.dependencies.contains_key(&name)
    }

    /// The files to load, dependencies first, each once. Modules that are built in need none.
    pub(crate) fn load_order(&self, modules: &[&str]) -> Result<Vec<PathBuf>, LabError> {
        let mut order: Vec<&str> = Vec::new();
        for module in modules {
            let name = module_name(module);
            if self.built_in.contains(&name) {
                continue;
            }
            let (path, needs) =
                self.dependencies
                    .get(&name)
                    .ok_or_else(|| LabError::ModuleMissing {
                        release: self.release.clone(),
                        module: name.clone(),
                    })?;
            // modules.dep lists a module's needs nearest first: the last must be loaded first.
            for path in needs.iter().rev().chain(std::iter::once(path)) {
                if !order.contains(&path.as_str()) {
                    order.push(path);
                }
            }
        }
        Ok(order
            .into_iter()
            .map(|path| self.folder.join(path))
            .collect())
    }
}

/// `kernel/arch/x86/kvm/kvm-amd.ko` → `kvm_amd`: the kernel treats `-` and `_` in names alike.
fn module_name(path: &str) -> String {
    let base = path.rsplit('/').next().unwrap_or(path);
    base.split('.').next().unwrap_or(base).replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn index() -> ModuleIndex {
        let kernel = KernelFiles {
            series: "6.12".into(),
            release: "6.12-test".into(),
            bz_image: PathBuf::new(),
            vmlinux: PathBuf::new(),
            modules: PathBuf::from("/m"),
        };
        ModuleIndex::parse(
            &kernel,
            "kernel/kvm-amd.ko: kernel/kvm.ko kernel/irqbypass.ko\nkernel/kvm.ko: kernel/irqbypass.ko\nkernel/irqbypass.ko:\n",
            "kernel/fs/ext4/ext4.ko\n",
        )
    }

    #[test]
    fn dependencies_come_first_and_once() {
        let order = index().load_order(&["kvm", "kvm_amd"]).unwrap();
        let order: Vec<_> = order.iter().map(|path| path.to_str().unwrap()).collect();
        assert_eq!(
            order,
            [
                "/m/kernel/irqbypass.ko",
                "/m/kernel/kvm.ko",
                "/m/kernel/kvm-amd.ko"
            ]
        );
    }

    #[test]
    fn a_built_in_module_needs_no_file() {
        assert!(index().load_order(&["ext4"]).unwrap().is_empty());
    }

    #[test]
    fn an_unknown_module_is_named() {
        let error = index().load_order(&["nosuch"]).unwrap_err().to_string();
        assert!(
            error.contains("nosuch") && error.contains("6.12-test"),
            "{error}"
        );
    }
}
