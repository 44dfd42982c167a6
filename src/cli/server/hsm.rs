//! `polykey hsm`: PKCS#11 tokens, asked from here and not by a server.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};
use polykey_hsm::pkcs11::{Pkcs11Token, SlotListing, WorkerCommand};
use polykey_hsm::{Deadline, WrapError};
use serde::Serialize;

use super::super::App as Cli;
use super::super::error::{CliError, Exit};
use super::super::output::{Human, View};
use super::runtime;
use crate::app::AppError;
use crate::config::{Config, Pkcs11, Wrapper};
use crate::custody::{MASTER_KEY, open_token};
use crate::{custody, hardening};

/// A smart card takes minutes to make an RSA key.
const PATIENCE: Duration = Duration::from_secs(300);

/// Subcommands of `hsm`.
#[derive(Subcommand, Debug)]
pub enum HsmCommand {
    /// List the slots and tokens of a PKCS#11 module. Takes no PIN.
    List(ListArgs),
    /// Make the key of a wrapper in its token: AES-256, or RSA-3072 for RSA-OAEP, never extractable.
    /// Nothing else ever makes one.
    CreateKek(CreateArgs),
}

/// Arguments of `hsm list`.
#[derive(Args, Debug)]
pub struct ListArgs {
    /// The module, an absolute path.
    #[arg(long, value_name = "FILE")]
    pub module: PathBuf,
    /// A variable for the module, such as SOFTHSM2_CONF=/etc/softhsm2.conf; may be repeated.
    #[arg(long = "env", value_name = "NAME=VALUE", value_parser = variable)]
    pub environment: Vec<(String, String)>,
}

/// Arguments of `hsm create-kek`.
#[derive(Args, Debug)]
pub struct CreateArgs {
    /// The configuration that names the wrapper.
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
    /// The wrapper: NAME of [wrappers.NAME]; without it, that of [master_key].
    #[arg(long, value_name = "NAME", default_value = MASTER_KEY, hide_default_value = true)]
    pub wrapper: String,
}

fn variable(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("write NAME=VALUE")?;
    Ok((name.to_owned(), value.to_owned()))
}

#[derive(Serialize)]
struct SlotView {
    slot: u64,
    description: String,
    label: Option<String>,
    serial: Option<String>,
    manufacturer: Option<String>,
    model: Option<String>,
    state: &'static str,
}

impl From<SlotListing> for SlotView {
    fn from(listing: SlotListing) -> Self {
        let SlotListing { slot, description, token } = listing;
        let state = match &token {
            None => "no token",
            Some(token) if !token.initialized => "not set up",
            Some(token) if token.pin_locked => "PIN locked",
            Some(token) if token.pin_low => "a wrong PIN was given",
            Some(_) => "ready",
        };
        let of = |read: fn(&polykey_hsm::pkcs11::TokenListing) -> &String| {
            token.as_ref().map(|token| read(token).clone())
        };
        Self {
            slot,
            description,
            label: of(|token| &token.label),
            serial: of(|token| &token.serial),
            manufacturer: of(|token| &token.manufacturer),
            model: of(|token| &token.model),
            state,
        }
    }
}

#[derive(Serialize)]
struct SlotsView {
    slots: Vec<SlotView>,
}

impl View for SlotsView {
    fn human(&self) -> Human {
        let text = |value: &Option<String>| value.clone().unwrap_or_default();
        let row = |slot: &SlotView| {
            vec![
                slot.slot.to_string(),
                slot.state.to_owned(),
                text(&slot.label),
                text(&slot.serial),
                text(&slot.model),
                slot.description.clone(),
            ]
        };
        let head = &["SLOT", "STATE", "LABEL", "SERIAL", "MODEL", "DESCRIPTION"];
        Human::Rows(head, self.slots.iter().map(row).collect())
    }
}

#[derive(Serialize)]
struct KekView {
    id: String,
    mechanism: &'static str,
    locked_in: bool,
}

impl View for KekView {
    fn human(&self) -> Human {
        let never = if self.locked_in { "never leaves the token" } else { "MAY LEAVE THE TOKEN" };
        Human::Record(vec![
            ("key", self.id.clone()),
            ("wraps with", self.mechanism.to_owned()),
            ("it", never.to_owned()),
        ])
    }
}

/// Does one of them.
///
/// # Errors
/// [`Exit::Usage`] for settings that cannot work, [`Exit::Unavailable`] if the token does not answer.
pub(in crate::cli) fn hsm(cli: &Cli, command: HsmCommand) -> Result<(), CliError> {
    hardening::private_files();
    match command {
        HsmCommand::List(args) => {
            let ListArgs { module, environment } = args;
            let asked = async {
                let worker = WorkerCommand::default();
                Pkcs11Token::list(module, environment, worker, Deadline::after(PATIENCE)).await
            };
            let slots = runtime()?.block_on(asked).map_err(|error| failed(&error, None))?;
            cli.out.print(&SlotsView { slots: slots.into_iter().map(SlotView::from).collect() })
        }
        HsmCommand::CreateKek(args) => {
            let config = Config::load(&args.config).map_err(AppError::from)?;
            let wrapper = match args.wrapper.as_str() {
                MASTER_KEY => Some(&config.master_key),
                name => config.wrappers.get(name),
            };
            let Some(Wrapper::Pkcs11(settings)) = wrapper else {
                let text = format!("`{}` is no wrapper of kind \"pkcs11\"", args.wrapper);
                return Err(CliError::usage(text).hint("Name one with --wrapper."));
            };
            let info = runtime()?.block_on(Box::pin(create(settings, &config)))?;
            cli.out.print(&KekView {
                id: info.id.as_str().to_owned(),
                mechanism: info.mechanism.name(),
                locked_in: info.locked_in,
            })
        }
    }
}

async fn create(
    settings: &Pkcs11,
    config: &Config,
) -> Result<polykey_hsm::pkcs11::KekInfo, CliError> {
    let unusable = |error: custody::WrapperError| CliError::usage(error.to_string());
    let token = open_token(settings, &config.bootstrap).await.map_err(unusable)?;
    let made = token.create_kek(&settings.key, Deadline::after(PATIENCE)).await;
    made.map_err(|error| failed(&error, token.last_failure()))
}

fn failed(error: &WrapError, detail: Option<String>) -> CliError {
    let exit = match error {
        WrapError::Unavailable { .. } | WrapError::DeadlineExceeded => Exit::Unavailable,
        _ => Exit::Usage,
    };
    let told = CliError::new(exit, error.to_string());
    match detail {
        Some(detail) if detail != error.to_string() => told.detail(detail),
        _ => told,
    }
}
