//! In the parent: one thread that starts the child, hands it one call at a time and replaces it.
//!
//! The child may hang, crash or be killed. A caller never waits past its deadline, and what waits
//! in the queue does not suffer from what runs.

use std::collections::VecDeque;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use futures::channel::oneshot;
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

use super::config::{PASSED_ON, TokenSelector, WorkerCommand};
use super::frame::{self, Frame, Hello, Reply, Request};
use super::{pipe, refused};
use crate::local::without_newline;
use crate::{Deadline, SecretSource, WrapError};

/// Tells a child whose child it is.
pub(super) const PARENT: &str = "POLYKEY_PKCS11_PARENT";
const UNAVAILABLE: WrapError = WrapError::Unavailable { retryable: true };
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const MAX_INBOX: usize = 8;
/// Bytes of a PIN, with room for a line break.
const MAX_PIN: usize = 4096;
/// How long a child that is told to end may take for the call that it is in.
pub(super) const LAST_CALL: Duration = Duration::from_secs(5);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// A smart card takes minutes to make an RSA key.
const LONGEST_CALL: Duration = Duration::from_secs(600);

/// What a child is started with.
pub(super) struct Setup {
    pub(super) module: PathBuf,
    pub(super) token: TokenSelector,
    pub(super) pin: Option<SecretSource>,
    /// The PIN itself, where the source was read by somebody else.
    pub(super) resolved: Option<Zeroizing<Vec<u8>>>,
    pub(super) call_timeout: Duration,
    pub(super) queue: usize,
    pub(super) environment: Vec<(String, String)>,
    pub(super) worker: WorkerCommand,
}

type Answer = Result<Reply, WrapError>;

struct Job {
    request: Frame,
    /// Whether a second child may be asked the same after the first died over it.
    repeatable: bool,
    /// Whether it may take until its deadline, and not the configured time.
    slow: bool,
    deadline: Deadline,
    caller: Option<oneshot::Sender<Answer>>,
}

impl Job {
    fn answer(&mut self, answer: Answer) {
        if let Some(caller) = self.caller.take() {
            // Whoever asked may have gone.
            let _ = caller.send(answer);
        }
    }

    fn is_over(&self) -> bool {
        self.caller.as_ref().is_none_or(oneshot::Sender::is_canceled)
    }

    /// Answers a caller whose deadline has passed.
    fn expire(&mut self) {
        if self.deadline.remaining().is_zero() {
            self.answer(Err(WrapError::DeadlineExceeded));
        }
    }
}

enum Event {
    Frame(Frame),
    Ended,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Job>,
    /// What readers of children post, by the generation of the child.
    inbox: VecDeque<(u64, Event)>,
    closed: bool,
    pid: Option<u32>,
    last_failure: Option<String>,
    /// A PIN that the token refused. It is not tried again.
    refused_pin: Option<Zeroizing<Vec<u8>>>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a change until then, and expires what waits in the queue.
    fn wait<'a>(
        &self,
        mut state: MutexGuard<'a, State>,
        until: Option<Instant>,
    ) -> MutexGuard<'a, State> {
        let expiry = state.queue.iter().map(|job| job.deadline.0).min();
        let until = [until, expiry].into_iter().flatten().min();
        state = match until {
            None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            Some(until) => {
                let left = until.saturating_duration_since(Instant::now());
                let waited = self.changed.wait_timeout(state, left);
                waited.unwrap_or_else(PoisonError::into_inner).0
            }
        };
        state.expire();
        state
    }
}

impl State {
    /// Answers those in the queue whose deadline has passed.
    fn expire(&mut self) {
        self.queue.iter_mut().for_each(Job::expire);
        self.queue.retain(|job| !job.is_over());
    }
}

/// The parent's side of one token. When it is dropped, the child ends.
pub(super) struct Host {
    shared: Arc<Shared>,
    queue: usize,
}

impl Host {
    pub(super) fn start(setup: Setup) -> io::Result<Self> {
        let shared =
            Arc::new(Shared { state: Mutex::new(State::default()), changed: Condvar::new() });
        let host = Self { shared: Arc::clone(&shared), queue: setup.queue };
        thread::Builder::new().name("pkcs11".to_owned()).spawn(move || {
            let supervisor = Supervisor {
                setup,
                shared,
                child: None,
                given_pin: None,
                generation: 0,
                failures: 0,
                resume: None,
            };
            supervisor.run();
        })?;
        Ok(host)
    }

    /// Asks the child. The answer comes by the deadline.
    pub(super) async fn ask(&self, request: &Request, deadline: Deadline) -> Answer {
        deadline.check()?;
        let (caller, answer) = oneshot::channel();
        {
            let mut state = self.shared.lock();
            if state.closed {
                return Err(UNAVAILABLE);
            }
            if state.queue.len() >= self.queue {
                state.last_failure =
                    Some(format!("{} calls wait for the token already", self.queue));
                return Err(UNAVAILABLE);
            }
            state.queue.push_back(Job {
                request: request.encode(),
                repeatable: request.is_repeatable(),
                slow: request.is_slow(),
                deadline,
                caller: Some(caller),
            });
        }
        self.shared.changed.notify_all();
        answer.await.unwrap_or(Err(UNAVAILABLE))
    }

    pub(super) fn last_failure(&self) -> Option<String> {
        self.shared.lock().last_failure.clone()
    }

    pub(super) fn pid(&self) -> Option<u32> {
        self.shared.lock().pid
    }

    pub(super) fn forget_refused_pin(&self) {
        if let Some(pin) = self.shared.lock().refused_pin.take() {
            refused::forget(&pin);
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.changed.notify_all();
    }
}

struct Running {
    child: Child,
    pipe: ChildStdin,
    /// How many requests it has answered.
    served: u64,
}

enum Outcome {
    Reply(Reply),
    Ended,
    TimedOut,
}

struct Supervisor {
    setup: Setup,
    shared: Arc<Shared>,
    child: Option<Running>,
    /// What the child was given, in case the token refuses it.
    given_pin: Option<Zeroizing<Vec<u8>>>,
    generation: u64,
    /// Children that ended since one last answered.
    failures: u32,
    /// Before then no child is started.
    resume: Option<Instant>,
}

impl Supervisor {
    fn run(mut self) {
        while let Some(mut job) = self.next() {
            let answer = self.work(&mut job);
            job.answer(answer);
        }
    }

    /// The next job, once there is one; `None` when the token was dropped.
    fn next(&mut self) -> Option<Job> {
        let shared = Arc::clone(&self.shared);
        let mut state = shared.lock();
        loop {
            if state.closed {
                return None;
            }
            // A child that dies while nobody asks is buried at once.
            if state.inbox.drain(..).any(|(generation, _)| generation == self.generation)
                && self.child.is_some()
            {
                drop(state);
                self.failed("the worker process ended by itself");
                state = shared.lock();
                continue;
            }
            if let Some(mut job) = state.queue.pop_front() {
                job.expire();
                if job.is_over() {
                    continue;
                }
                return Some(job);
            }
            state = shared.wait(state, None);
        }
    }

    fn work(&mut self, job: &mut Job) -> Answer {
        loop {
            self.ensure_child(job)?;
            // A child that has served may be sick; what a fresh one says of a token is so.
            let fresh = self.child.as_ref().is_none_or(|child| child.served == 0);
            let outcome = self.call(job);
            match outcome {
                Outcome::Reply(Reply::Unavailable(text)) => {
                    self.failed(&text);
                    if fresh {
                        // Whoever waits would hear the same.
                        let mut state = self.shared.lock();
                        for mut other in state.queue.drain(..) {
                            other.answer(Err(UNAVAILABLE));
                        }
                        return Err(UNAVAILABLE);
                    }
                }
                Outcome::Reply(Reply::PinRefused { token, text }) => {
                    let text = self.pin_refused(token, &text);
                    return Err(WrapError::Config(text));
                }
                Outcome::Reply(Reply::Refused(text)) => {
                    self.succeeded();
                    self.shared.lock().last_failure = Some(text.clone());
                    return Err(WrapError::Config(text));
                }
                Outcome::Reply(reply) => {
                    self.succeeded();
                    return Ok(reply);
                }
                Outcome::TimedOut => {
                    let limit = self.setup.call_timeout;
                    self.hung(&if job.slow {
                        "the module did not answer by the deadline".to_owned()
                    } else {
                        format!("the module did not answer within {limit:?}")
                    });
                    return Err(UNAVAILABLE);
                }
                Outcome::Ended => {
                    self.failed("the worker process ended over a call");
                    if fresh {
                        return Err(UNAVAILABLE);
                    }
                }
            }
            if !job.repeatable || job.is_over() {
                return Err(UNAVAILABLE);
            }
        }
    }

    fn succeeded(&mut self) {
        self.failures = 0;
        if let Some(child) = &mut self.child {
            child.served += 1;
        }
    }

    /// Ends the child, and lets some time pass before the next one.
    fn failed(&mut self, text: &str) {
        self.dismiss();
        self.pause(text);
    }

    /// The same for one that hangs.
    fn hung(&mut self, text: &str) {
        self.end(Duration::ZERO);
        self.pause(text);
    }

    fn pause(&mut self, text: &str) {
        let pause = FIRST_PAUSE.saturating_mul(1 << self.failures.min(8)).min(LONGEST_PAUSE);
        self.failures = self.failures.saturating_add(1);
        self.resume = Instant::now().checked_add(pause);
        self.shared.lock().last_failure = Some(text.to_owned());
    }

    fn pin_refused(&mut self, token: String, text: &str) -> String {
        self.dismiss();
        let origin = self.setup.pin.as_ref().map(ToString::to_string).unwrap_or_default();
        let text = format!(
            "the token refused the PIN of {origin} ({text}): it is not tried again until it changes"
        );
        let pin = self.given_pin.take();
        if let Some(pin) = &pin {
            refused::note(token, pin);
        }
        let mut state = self.shared.lock();
        state.refused_pin = pin;
        state.last_failure = Some(text.clone());
        text
    }

    /// Lets the child end by itself, for it may be in the middle of writing what the token keeps:
    /// a module of which that is a file is not to be killed without need.
    fn dismiss(&mut self) {
        self.end(LAST_CALL);
    }

    fn end(&mut self, patience: Duration) {
        // Closing its pipe tells the child.
        let Some(Running { mut child, pipe, .. }) = self.child.take() else { return };
        drop(pipe);
        self.shared.lock().pid = None;
        if patience.is_zero() {
            let _ = child.kill();
        }
        // A process in an uninterruptible call is reaped when it gets out of it.
        let reap = move || {
            let until = Instant::now() + patience;
            while Instant::now() < until {
                if !matches!(child.try_wait(), Ok(None)) {
                    return;
                }
                thread::sleep(Duration::from_millis(10));
            }
            let _ = child.kill();
            let _ = child.wait();
        };
        let _ = thread::Builder::new().name("pkcs11-reap".to_owned()).spawn(reap);
    }

    /// Sees to it that there is a child, which takes a pause after another's end.
    fn ensure_child(&mut self, job: &mut Job) -> Result<(), WrapError> {
        if self.child.is_some() {
            return Ok(());
        }
        let shared = Arc::clone(&self.shared);
        let mut state = shared.lock();
        while let Some(resume) = self.resume.filter(|resume| *resume > Instant::now()) {
            job.expire();
            if state.closed || job.is_over() {
                return Err(WrapError::DeadlineExceeded);
            }
            state = shared.wait(state, Some(resume.min(job.deadline.0)));
        }
        drop(state);
        let pin = self.pin()?;
        let hello = Hello {
            module: self.setup.module.clone(),
            token: self.setup.token.clone(),
            refused_by: pin.as_ref().map(|pin| refused::by(pin)).unwrap_or_default(),
            pin,
        };
        match self.spawn(&hello.encode(), job) {
            Ok(()) => {
                self.given_pin = hello.pin;
                Ok(())
            }
            Err(e) => {
                let program = self.setup.worker.program.display();
                self.failed(&format!("the worker process {program} does not start: {e}"));
                Err(UNAVAILABLE)
            }
        }
    }

    /// The PIN, unless it is the one that the token refused.
    fn pin(&self) -> Result<Option<Zeroizing<Vec<u8>>>, WrapError> {
        let Some(source) = &self.setup.pin else { return Ok(None) };
        let read = match &self.setup.resolved {
            Some(pin) => Ok(pin.clone()),
            None => source.read(MAX_PIN),
        };
        let read = read.map(|pin| Zeroizing::new(without_newline(&pin).to_vec()));
        let mut state = self.shared.lock();
        let pin = match read {
            Ok(pin) if pin.is_empty() => Err(format!("{source} holds no PIN")),
            Ok(pin) => {
                let refused = state.refused_pin.as_ref();
                if refused.is_some_and(|refused| bool::from(refused.as_slice().ct_eq(&pin))) {
                    Err(format!(
                        "the token refused the PIN of {source}: it is not tried again until it \
                         changes"
                    ))
                } else {
                    Ok(Some(pin))
                }
            }
            Err(e) => Err(e.to_string()),
        };
        pin.map_err(|text| {
            state.last_failure = Some(text.clone());
            WrapError::Config(text)
        })
    }

    fn spawn(&mut self, hello: &[u8], job: &mut Job) -> io::Result<()> {
        let WorkerCommand { program, args } = &self.setup.worker;
        let mut command = Command::new(program);
        command
            .args(args)
            .env_clear()
            .envs(PASSED_ON.iter().filter_map(|name| Some((name, std::env::var_os(name)?))))
            .envs(self.setup.environment.iter().map(|(name, value)| (name, value)))
            .env(PARENT, std::process::id().to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            // What a terminal sends to this program is not for the child.
            .process_group(0);
        let mut child = command.spawn()?;
        self.generation += 1;
        let pid = child.id();
        let pipes = (child.stdin.take(), child.stdout.take());
        let (Some(pipe), Some(from)) = pipes else { return Err(io::ErrorKind::BrokenPipe.into()) };
        self.child = Some(Running { child, pipe, served: 0 });
        self.shared.lock().pid = Some(pid);
        let (shared, generation) = (Arc::clone(&self.shared), self.generation);
        thread::Builder::new()
            .name("pkcs11-read".to_owned())
            .spawn(move || listen(&shared, generation, from))?;
        self.say(hello, job)
    }

    /// Hands the child a frame, if it takes it in the time of a call.
    fn say(&mut self, frame: &[u8], job: &mut Job) -> io::Result<()> {
        let Some(running) = &mut self.child else { return Err(io::ErrorKind::BrokenPipe.into()) };
        let (shared, deadline) = (&self.shared, Deadline::after(self.setup.call_timeout));
        pipe::write(&mut running.pipe, frame, deadline, || {
            job.expire();
            shared.lock().expire();
        })
    }

    /// Hands the child a request and waits for what comes of it, at most a call's time. The caller
    /// hears no later than the deadline; the child is given its time all the same, so that hasty
    /// callers do not end it over and over.
    fn call(&mut self, job: &mut Job) -> Outcome {
        let request = std::mem::take(&mut job.request);
        let said = self.say(&request, job);
        job.request = request;
        match said {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::TimedOut => return Outcome::TimedOut,
            Err(_) => return Outcome::Ended,
        }
        let usual = self.setup.call_timeout;
        let slow = job.deadline.remaining().min(LONGEST_CALL).max(usual);
        let end = Deadline::after(if job.slow { slow } else { usual });
        let mut state = self.shared.lock();
        loop {
            while let Some((generation, event)) = state.inbox.pop_front() {
                match event {
                    _ if generation != self.generation => {}
                    Event::Frame(frame) => {
                        return Reply::decode(&frame).map_or(Outcome::Ended, Outcome::Reply);
                    }
                    Event::Ended => return Outcome::Ended,
                }
            }
            job.expire();
            if end.remaining().is_zero() {
                return Outcome::TimedOut;
            }
            if state.closed {
                return Outcome::Ended;
            }
            let until = if job.is_over() { end.0 } else { end.0.min(job.deadline.0) };
            state = self.shared.wait(state, Some(until));
        }
    }
}

impl Drop for Supervisor {
    /// However it ends: nobody may wait for it.
    fn drop(&mut self) {
        self.dismiss();
        let mut state = self.shared.lock();
        state.closed = true;
        state.queue.clear();
    }
}

/// Posts what a child says, until it ends.
fn listen(shared: &Shared, generation: u64, mut from: ChildStdout) {
    loop {
        let event = match frame::read(&mut from) {
            Ok(Some(frame)) => Event::Frame(frame),
            Ok(None) | Err(_) => Event::Ended,
        };
        let mut state = shared.lock();
        // One answer a request: what says more is not listened to, and its pipe is closed.
        let ended = matches!(event, Event::Ended) || state.inbox.len() >= MAX_INBOX;
        state.inbox.push_back((generation, if ended { Event::Ended } else { event }));
        drop(state);
        shared.changed.notify_all();
        if ended {
            return;
        }
    }
}
