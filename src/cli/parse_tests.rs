//! Every form of the command line that scripts and documents rely on, and some that must be refused.

use clap::{CommandFactory, Parser};

use super::Cli;

const ID: &str = "018f4e3c-7c4a-7c0a-8f5e-0123456789ab";

#[test]
fn the_definition_is_consistent() {
    Cli::command().debug_assert();
}

fn parse(line: &str) -> Result<Cli, clap::Error> {
    let words = line.split_whitespace().map(|word| word.replace("ID", ID));
    Cli::try_parse_from(std::iter::once("polykey".to_owned()).chain(words))
}

#[test]
fn the_fixed_forms_parse() {
    let lines = "\
dev
dev --dir /tmp/p --listen 127.0.0.1:0
init --config F
serve --config F
serve --config F --accept-rollback
restore --config F --from B --accept-rollback
store compact --store F
check --config F
key create --type aes-256
key create --type api-key --value-file -
key create --type rsa-4096 --alias orders --tag a=b --tag c= --description x --expires 90d
key create --type ecdsa-p384 --expires 2030-01-01T00:00:00Z --exportable --read-after-expiry
key create --type aes-256 --exportable=false --context alice --context bob --policy night=f.cedar
key create --type aes-256 --classification secret --rotation-period 90d --storage hardened
key get ID
key get alias/orders --version 3
key get ID --public-key
key list
key list --type aes-256 --type api-key --status active --tag a= --created-after 7d --limit 5
key describe alias/orders --uses --policies --version 1
key update ID --tag a=b --remove-tag c --context x --remove-context y --policy n=f --remove-policy m
key update ID --description d --expires 1d --classification none --expected-revision 7
key update ID --no-expiry --rotation-period 0s
key rotate ID
key rotate ID --strategy hot --grace 30d --expected-revision 2
key rotate ID --strategy staged --at 2030-01-01T00:00:00Z
key rotate ID --strategy scheduled --period 90d
key rotate ID --value-file F --clear-policies
key revoke ID
key revoke ID --reason gone --at 3d
key enable ID
key disable alias/a --expected-revision 1
key destroy ID --days 7 --yes
key destroy ID
key cancel-destroy ID
key export ID --plain --out f --encoding hex
key export ID --recipient pub.pem --out x.hpke --version 2
key open-export --private k.pem --in x.hpke
key export-keygen --private k.pem --public p.pem
key history ID --since 1d --until 1h --limit 3
key alias set orders ID
key alias set alias/orders alias/other --expected-key ID
key alias delete orders
key alias list
key alias list ID --limit 2
key versions ID
key bounds ID --min-decryption 2 --min-encryption 0
key trim ID --min-available 2 --yes
client add bob
client add bob --name Bob --role user --permission keys:read --dns b.example --tier pro --no-api-key
client add bob --spiffe spiffe://a/b --api-key-expires 90d --api-key-out f
client list --role admin --state disabled --limit 1
client describe bob
client update bob --role a --remove-role b --remove-identity dns:b.example --expected-revision 3
client disable bob
client enable bob
client rotate-api-key bob --overlap 1h --expires 90d
client remove bob --yes
role list
role put ops --permission keys:read --permission keys:list --expected-revision 0
role delete ops
cert issue bob --out d --days 400 --force
cert issue bob --out d --csr r.pem --key k.pem
login
whoami
token revoke
token revoke --client bob
token revoke --token-file - --client bob
root status
root rotate --expected-root 00
root rewrap main --source file:/k --kind local-file --label l --expected-generation 1
root slot list
root slot add spare --wrapper hsm --expected-generation 1
root slot add safe --shares 5 --threshold 3 --out d
root slot test spare
root slot remove spare --expected-generation 2
root slot rotate main --source file:/k
root recovery-key --out f
recover --config f --share a --share b --generate-master-key
recover --config f --key -
lock --config f
unlock --socket s --passphrase -
unlock --share a --share b
unlock --status
hsm list --module /m.so --env A=B
hsm create-kek --config f --wrapper hsm
policy check a.cedar b.cedar
policy check a.cedar --key-policy
policy list --text
policy list --schema
policy explain --client bob --action keys:read --key ID
policy explain --client bob --action clients:admin
audit list
audit list --since 1h --until 1m --client bob --action keys:* --key ID --outcome denied --limit 5
audit list --follow --from 7
audit verify
audit verify --export f --public-key k --checkpoint c
audit verify --store f
audit export f
audit checkpoint
audit list --value-hash hmac:00112233445566778899aabbccddeeff
audit verify --export a --export b --public-key k
audit verify --archive a --archive b
audit verify --archive a b --archive c --public-key k
audit verify --export a b c --checkpoint d
audit archive --to f
audit archive --to f --before 400d --leaves 5 --public-key k
audit hash
audit hash --value-file f
store status
store verify
jobs
jobs --kind end-grace --key ID --limit 1
jobs --kind end_grace
jobs --kind notify_expiry
health
health --addr 127.0.0.1:9 --timeout 1s --service polykey.v2.PolykeyService
health --metrics
completion bash
completion zsh
completion fish
man d
version
version -o json
-o json key list
--profile p.toml whoami --output table
whoami --profile p.toml";
    for line in lines.lines() {
        if let Err(error) = parse(line) {
            panic!("{line}: {error}");
        }
    }
}

#[test]
fn mistakes_are_refused_with_exit_code_2() {
    let lines = "\
frobnicate
key
key create
key create --type aes-192
key create --type aes-256 --tag a
key create --type aes-256 --expires tomorrow
key create --type aes-256 --policy x
key get orders
key get alias/
key get ID --version -1
key list --limit many
key rotate ID --strategy scheduled
key rotate ID --grace 30
key rotate ID --grace -1d
key destroy ID --days 6
key destroy ID --days 31
key update ID --expires 1d --no-expiry
key export ID
key export ID --plain --recipient f
key bounds ID
key bounds ID --min-decryption 0
key trim ID
client add
client update bob --remove-identity b.example
cert issue bob
cert issue bob --out d --csr r.pem
cert issue bob --out d --days 401
root rewrap --source hunter2
root slot add x
root slot add x --shares 3
root slot add x --shares 3 --threshold 2
root slot add x --shares 1 --threshold 1 --out d
root slot add x --wrapper a --shares 3 --threshold 2 --out d
root slot add x --recovery-key hunter2
recover --config f
recover --config f --key k --share s
policy check
policy explain --client bob
audit list --follow --limit 3
audit verify --export f --store g
audit verify --archive f --export g
audit archive
audit archive --to f --leaves 0
audit hash value
audit list --value-hash hmac:00
health --addr 127.0.0.1:9 --metrics
health --timeout 5
completion powershell
serve
dev --listen 50053
whoami -o yaml";
    for line in lines.lines() {
        match parse(line) {
            Ok(cli) => panic!("{line}: parsed as {cli:?}"),
            Err(error) => assert_eq!(error.exit_code(), 2, "{line}: {error}"),
        }
    }
}

#[test]
fn help_has_the_exit_codes_and_every_argument_a_text() {
    assert!(Cli::command().render_long_help().to_string().contains("7  data loss"));
    let mut commands = vec![Cli::command()];
    while let Some(command) = commands.pop() {
        let name = command.get_name().to_owned();
        assert!(command.get_about().is_some(), "{name}");
        for argument in command.get_arguments() {
            assert!(argument.get_help().is_some(), "{name} {}", argument.get_id());
        }
        commands.extend(command.get_subcommands().cloned());
    }
}
