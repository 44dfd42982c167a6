// A client in Go: log in, create a key, rotate it, read it, revoke it.
//
//	protoc --go_out=. --go-grpc_out=. -I proto proto/polykey/v2/*.proto proto/common/v2/*.proto
//	go run examples/client.go 127.0.0.1:50053 .polykey admin
//
// Compiled where a Go toolchain is; not compiled by the tests of this repository.
package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"log"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/google/uuid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"

	pb "github.com/polykey/polykey/gen/polykey/v2"
)

func main() {
	if len(os.Args) != 4 {
		log.Fatal("usage: client ADDRESS DIRECTORY NAME")
	}
	address, directory, name := os.Args[1], os.Args[2], os.Args[3]
	file := func(suffix string) []byte {
		bytes, err := os.ReadFile(filepath.Join(directory, suffix))
		if err != nil {
			log.Fatal(err)
		}
		return bytes
	}

	certificate, err := tls.X509KeyPair(file(name+".pem"), file(name+".key"))
	if err != nil {
		log.Fatal(err)
	}
	authorities := x509.NewCertPool()
	authorities.AppendCertsFromPEM(file("ca.pem"))
	connection, err := grpc.NewClient(address, grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{
		Certificates: []tls.Certificate{certificate},
		RootCAs:      authorities,
		MinVersion:   tls.VersionTLS13,
	})))
	if err != nil {
		log.Fatal(err)
	}
	defer connection.Close()
	service := pb.NewPolykeyServiceClient(connection)

	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	login, err := service.Authenticate(ctx, &pb.AuthenticateRequest{
		ClientId: name,
		ApiKey:   strings.TrimSpace(string(file(name + ".api-key"))),
	})
	if err != nil {
		log.Fatal(err)
	}
	// Every mutation with an idempotency key of its own, under which it may be sent again.
	with := func() context.Context {
		return metadata.AppendToOutgoingContext(ctx,
			"authorization", "Bearer "+login.AccessToken,
			"idempotency-key", uuid.NewString())
	}

	created, err := service.CreateKey(with(), &pb.CreateKeyRequest{
		KeyType:     pb.KeyType_KEY_TYPE_AES_256,
		Description: "orders",
		Tags:        map[string]string{"team": "shop"},
	})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("created", created.KeyId)

	rotated, err := service.RotateKey(with(), &pb.RotateKeyRequest{
		KeyId:              created.KeyId,
		Strategy:           pb.RotationStrategy_ROTATION_STRATEGY_HOT,
		GracePeriodSeconds: 86400,
	})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("version", rotated.NewVersion, "follows", rotated.PreviousVersion)

	got, err := service.GetKey(with(), &pb.GetKeyRequest{KeyId: created.KeyId})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(len(got.KeyMaterial.EncryptedKeyData), "bytes,", got.KeyMaterial.EncryptionAlgorithm)

	if _, err := service.RevokeKey(with(), &pb.RevokeKeyRequest{
		KeyId:            created.KeyId,
		RevocationReason: "the sample is over",
	}); err != nil {
		log.Fatal(err)
	}
	fmt.Println("revoked")
}
