//! What the process gives up once it knows its configuration: it writes only where it keeps things,
//! runs nothing but itself, binds only its own ports, and makes none of the system calls that a
//! server has no use for. Whoever takes it over inherits that, as do the processes it starts.
//!
//! Landlock (since Linux 5.13; the kernel's documentation, "Landlock: unprivileged access control") and
//! seccomp (seccomp(2)). Both hold for the thread and those it starts, so this comes before the first one.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, AccessFs, AccessNet, CompatLevel, Compatible, NetPort, PathBeneath, PathFd, Ruleset,
    RulesetAttr, RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule,
};

use super::Missed;
use crate::config::sinks::{Target, Way};
use crate::config::{Anchor, Config, Wrapper};

/// The newest rules that are asked for; a kernel that knows fewer enforces those.
const RULES: ABI = ABI::V6;

/// What a configuration leaves a node to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Needs {
    /// Directories in which it makes and changes files.
    writable: Vec<PathBuf>,
    /// Ports it listens on.
    ports: Vec<u16>,
    /// Whether it calls others over TCP.
    calls: bool,
    /// Whether it starts itself again, to drive PKCS#11 modules.
    token: bool,
    /// Whether a library may run programs of the operator's choice.
    runs: bool,
}

impl Needs {
    /// # Errors
    /// What keeps the files from being confined, and what to do.
    pub(super) fn of(config: &Config) -> Result<Self, String> {
        let wrappers = || std::iter::once(&config.master_key).chain(config.wrappers.values());
        let token = wrappers().any(|wrapper| matches!(wrapper, Wrapper::Pkcs11(_)));
        let aws = wrappers().any(|wrapper| matches!(wrapper, Wrapper::Aws(_)));
        if token && config.runtime.writable.is_empty() {
            return Err(
                "a PKCS#11 module writes in places of its own: name them in [runtime] writable, \
                        or the node's own data directory if there are none"
                    .to_owned(),
            );
        }
        let parent = |path: &Path| path.parent().map(Path::to_owned);
        let mut writable = vec![config.node.data_dir.clone()];
        writable.extend(parent(&config.storage.path).filter(|_| config.storage.database.is_none()));
        writable.extend(config.anchor.as_ref().and_then(Anchor::file).and_then(parent));
        writable.extend(parent(&config.unlock.socket));
        writable.extend(config.audit.archive.as_ref().map(|archive| archive.directory.clone()));
        writable.extend(config.runtime.writable.iter().cloned());
        let plain = [config.listen.health, config.listen.metrics].into_iter().flatten();
        let plain = plain.map(|address| address.port());
        let ports = std::iter::once(config.listen.address.port()).chain(plain).collect();
        let mut away = config.storage.database.is_some() || config.replication.is_some();
        away |= config.telemetry.is_some() || !config.webhooks.is_empty();
        for sink in config.audit.sinks.values() {
            match &sink.target {
                Target::File(file) => writable.extend(parent(&file.path)),
                Target::Syslog(syslog) => away |= !matches!(syslog.way, Way::Unix(_)),
                Target::Otlp(_) => away = true,
            }
        }
        let calls = token || aws || away || config.refers_to_parameters();
        // `credential_process` of an AWS profile.
        Ok(Self { writable, ports, calls, token, runs: aws || config.refers_to_parameters() })
    }
}

impl Needs {
    fn covers(&self, other: &Self) -> bool {
        let all = |of: &[PathBuf]| of.iter().all(|place| self.writable.contains(place));
        all(&other.writable)
            && other.ports.iter().all(|port| self.ports.contains(port))
            && (self.calls || !other.calls)
            && (self.token || !other.token)
            && (self.runs || !other.runs)
    }
}

/// Whether a process that was confined for one configuration can do what another one needs.
pub(super) fn fits(was: &Config, is: &Config) -> bool {
    match (Needs::of(was), Needs::of(is)) {
        _ if !was.runtime.sandbox => true,
        // What keeps files from being confined lets everything be.
        (Err(_), _) => true,
        (Ok(was), Ok(is)) => was.covers(&is),
        (Ok(_), Err(_)) => false,
    }
}

/// Why this configuration on this kernel cannot be confined, if it cannot.
pub(super) fn lacking(config: &Config) -> Option<String> {
    // Whatever is asked of the kernel is asked of a thread that ends.
    let config = config.clone();
    let tried = std::thread::spawn(move || Needs::of(&config).and_then(|needs| landlock(&needs)));
    match tried.join() {
        Ok(Ok(())) if Path::new("/proc/sys/kernel/seccomp/actions_avail").exists() => None,
        Ok(Ok(())) => Some("this kernel has no seccomp".to_owned()),
        Ok(Err(why)) => Some(why),
        Err(_) => Some("the kernel could not be asked".to_owned()),
    }
}

/// Confines this process.
pub(super) fn confine(config: &Config) -> Vec<Missed> {
    let mut missed = Vec::new();
    let mut attempt = |measure, result: Result<(), String>| {
        if let Err(reason) = result {
            missed.push(Missed { measure, reason });
        }
    };
    // Landlock holds for this thread and those it starts: another one would be left out.
    let threads = std::fs::read_dir("/proc/self/task").map_or(1, Iterator::count);
    let alone = match threads {
        1 => Ok(()),
        more => Err(format!("{more} threads run already, which is a bug")),
    };
    attempt("confined before the first thread", alone);
    let needs = Needs::of(config);
    let (runs, calls) = needs.as_ref().map_or((true, true), |n| (n.token || n.runs, n.calls));
    attempt("confined files", needs.and_then(|needs| landlock(&needs)));
    attempt("fewer system calls", seccomp(runs, calls).map_err(|error| error.to_string()));
    missed
}

fn landlock(needs: &Needs) -> Result<(), String> {
    match ruleset(needs).map_err(|error| error.to_string())? {
        RulesetStatus::NotEnforced => Err("this kernel has no Landlock".to_owned()),
        RulesetStatus::PartiallyEnforced | RulesetStatus::FullyEnforced => Ok(()),
    }
}

fn ruleset(needs: &Needs) -> Result<RulesetStatus, RulesetError> {
    // Devices are opened by name for their ioctls by nobody here, but terminals are asked for their size.
    let write = AccessFs::from_write(RULES) & !AccessFs::IoctlDev;
    let mut handled = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(write)?
        .handle_access(AccessNet::BindTcp)?
        .scope(Scope::Signal)?;
    // A service manager may have its socket there.
    let notify = std::env::var_os("NOTIFY_SOCKET");
    if !notify.is_some_and(|path| path.as_encoded_bytes().starts_with(b"@")) {
        handled = handled.scope(Scope::AbstractUnixSocket)?;
    }
    if !needs.runs {
        handled = handled.handle_access(AccessFs::Execute)?;
    }
    if !needs.calls {
        handled = handled.handle_access(AccessNet::ConnectTcp)?;
    }
    let mut rules = handled.create()?;
    let places = needs.writable.iter().map(|place| (place.as_path(), write));
    let null = (Path::new("/dev/null"), AccessFs::WriteFile.into());
    // Itself, for the process that drives a PKCS#11 module, and the loader.
    let programs = ["/proc/self/exe", "/lib", "/lib64", "/usr/lib"].map(Path::new);
    let programs = programs.into_iter().filter(|_| needs.token && !needs.runs);
    let programs = programs.map(|program| (program, AccessFs::Execute.into()));
    for (path, access) in places.chain([null]).chain(programs) {
        // What is not there is not opened either: a start says so better.
        if let Ok(file) = PathFd::new(path) {
            rules = rules.add_rule(PathBeneath::new(file, access))?;
        }
    }
    for port in &needs.ports {
        rules = rules.add_rule(NetPort::new(*port, AccessNet::BindTcp))?;
    }
    Ok(rules.restrict_self()?.ruleset)
}

/// System calls that change the machine, look into other processes, load code into the kernel, or have
/// been its weak places. They fail with EPERM.
const REFUSED: [i64; 53] = [
    libc::SYS_acct,
    libc::SYS_add_key,
    libc::SYS_adjtimex,
    libc::SYS_bpf,
    libc::SYS_chroot,
    libc::SYS_clock_adjtime,
    libc::SYS_clock_settime,
    libc::SYS_delete_module,
    libc::SYS_fanotify_init,
    libc::SYS_finit_module,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fsopen,
    libc::SYS_fspick,
    libc::SYS_init_module,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_io_uring_setup,
    libc::SYS_kcmp,
    libc::SYS_kexec_file_load,
    libc::SYS_kexec_load,
    libc::SYS_keyctl,
    libc::SYS_lookup_dcookie,
    // What is only in memory could be run past the rules for files.
    libc::SYS_memfd_create,
    libc::SYS_mount,
    libc::SYS_mount_setattr,
    libc::SYS_move_mount,
    libc::SYS_name_to_handle_at,
    libc::SYS_open_by_handle_at,
    libc::SYS_open_tree,
    libc::SYS_perf_event_open,
    libc::SYS_personality,
    libc::SYS_pidfd_getfd,
    libc::SYS_pivot_root,
    libc::SYS_process_madvise,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_ptrace,
    libc::SYS_quotactl,
    libc::SYS_reboot,
    libc::SYS_request_key,
    libc::SYS_setdomainname,
    libc::SYS_sethostname,
    libc::SYS_setns,
    libc::SYS_settimeofday,
    libc::SYS_swapoff,
    libc::SYS_swapon,
    libc::SYS_syslog,
    libc::SYS_umount2,
    libc::SYS_unshare,
    libc::SYS_userfaultfd,
    libc::SYS_vhangup,
    libc::SYS_vmsplice,
];

/// `runs`: it may start programs. `calls`: it calls others.
fn seccomp(runs: bool, calls: bool) -> Result<(), Box<dyn std::error::Error>> {
    let mut rules: BTreeMap<i64, Vec<_>> = REFUSED.iter().map(|call| (*call, Vec::new())).collect();
    if !runs {
        rules.extend([libc::SYS_execve, libc::SYS_execveat].map(|call| (call, Vec::new())));
    }
    rules.insert(libc::SYS_socket, sockets(calls)?);
    let refused = SeccompAction::Errno(u32::try_from(libc::EPERM)?);
    let arch = std::env::consts::ARCH.try_into()?;
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, refused, arch)?;
    let program: BpfProgram = filter.try_into()?;
    Ok(seccompiler::apply_filter_all_threads(&program)?)
}

/// The sockets that are refused, since Landlock knows TCP alone: what passes for TCP and is not (MPTCP), other
/// ways out of the machine, and whatever is no TCP for a node that calls nobody.
fn sockets(calls: bool) -> Result<Vec<SeccompRule>, Box<dyn std::error::Error>> {
    let is = |argument: u8, value: libc::c_int| {
        let value = u64::try_from(value)?;
        let equal = SeccompCmpOp::Eq;
        Ok::<_, Box<dyn std::error::Error>>(SeccompCondition::new(
            argument,
            SeccompCmpArgLen::Dword,
            equal,
            value,
        )?)
    };
    let kind = |kind: libc::c_int| {
        // Beside the kind stand flags.
        let masked = SeccompCmpOp::MaskedEq(0xf);
        Ok::<_, Box<dyn std::error::Error>>(SeccompCondition::new(
            1,
            SeccompCmpArgLen::Dword,
            masked,
            u64::try_from(kind)?,
        )?)
    };
    let mut refused = vec![SeccompRule::new(vec![is(2, libc::IPPROTO_MPTCP)?])?];
    for family in [libc::AF_VSOCK, libc::AF_PACKET] {
        refused.push(SeccompRule::new(vec![is(0, family)?])?);
    }
    if !calls {
        for family in [libc::AF_INET, libc::AF_INET6] {
            for other in [libc::SOCK_DGRAM, libc::SOCK_RAW, libc::SOCK_SEQPACKET] {
                refused.push(SeccompRule::new(vec![is(0, family)?, kind(other)?])?);
            }
        }
    }
    Ok(refused)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "[node]\ndata_dir = \"/d\"\n[listen]\ncertificate = \"c\"\nkey = \"k\"\n\
        client_ca = \"a\"\n[storage]\npath = \"/s/polykey.redb\"\n";

    fn needs(more: &str) -> Result<Needs, String> {
        let text = format!("{TEXT}{more}");
        Needs::of(&Config::parse(Path::new("/x/p.toml"), &text).unwrap())
    }

    #[test]
    fn a_node_without_a_network_calls_nobody() {
        let alone = needs("[master_key]\nsource = { file = \"m\" }\n").unwrap();
        assert!(!alone.calls && !alone.runs, "{alone:?}");
        let places = ["/d", "/s", "/d"].map(PathBuf::from);
        assert_eq!(
            (alone.writable.as_slice(), alone.ports.as_slice()),
            (&places[..], &[50053][..])
        );
        let parameter = needs("[master_key]\nsource = { ssm = \"/p\" }\n").unwrap();
        assert!(parameter.calls && parameter.runs);
        let told = "[master_key]\nsource = { file = \"m\" }\n[webhooks.ops]\nurl = \"https://h/\"\n\
                    secret = { file = \"w\" }\n";
        let told = needs(told).unwrap();
        assert!(told.calls && !told.runs, "{told:?}");
    }

    #[test]
    fn less_fits_into_more_and_not_the_other_way() {
        let config =
            |more: &str| Config::parse(Path::new("/x/p.toml"), &format!("{TEXT}{more}")).unwrap();
        let less = config("[master_key]\nsource = { file = \"m\" }\n");
        let more = config("[master_key]\nsource = { ssm = \"/p\" }\n[anchor]\nfile = \"/a/b\"\n");
        assert!(fits(&more, &less) && fits(&less, &less));
        assert!(!fits(&less, &more));
    }

    #[test]
    fn a_module_needs_its_places_named() {
        let token = "[master_key]\nkind = \"pkcs11\"\nmodule = \"/m.so\"\ntoken = { label = \"t\" }\n\
                     key = { label = \"k\" }\npin = { file = \"p\" }\n";
        assert!(needs(token).unwrap_err().contains("[runtime] writable"));
        let named = needs(&format!("{token}[runtime]\nwritable = [\"/t\"]\n")).unwrap();
        assert!(named.writable.contains(&PathBuf::from("/t")) && named.calls);
    }
}
